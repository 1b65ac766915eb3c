"""A headless Chromium for tests: an installed one, else one that is installed here and now."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Error, Playwright, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
INSTALL_SECONDS = 300


def installed() -> str | None:
    """Path of a Chromium of this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def launched(playwright: Playwright) -> tuple[Browser | None, str]:
    """A browser, or None with the reason."""
    reason = "no Chromium is installed"
    for path in (installed(), None):  # None: playwright's own
        try:
            options = ["--no-sandbox", "--disable-gpu"]
            return playwright.chromium.launch(executable_path=path, args=options), ""
        except Error as error:
            reason = str(error).strip().splitlines()[0]
    return None, reason


def install() -> str:
    """Try the system's packages (as root), then playwright's download. Returns what failed, in one line."""
    commands = [[sys.executable, "-m", "playwright", "install", "--with-deps", "chromium"]]
    if shutil.which("apt-get") and os.geteuid() == 0:
        commands.insert(
            0, ["sh", "-c", "apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium"]
        )
    failed = []
    for command in commands:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS
            )
        except subprocess.TimeoutExpired:
            failed.append(f"{command[0]}: no end after {INSTALL_SECONDS} s")
            continue
        if done.returncode == 0:
            return ""
        failed.append(f"{command[0]}: {(done.stderr or done.stdout).strip().splitlines()[-1:]}")
    return "; ".join(failed)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Skips, with the reason, only where no Chromium runs and none can be installed."""
    with sync_playwright() as playwright:
        found, reason = launched(playwright)
        if found is None:
            failed = install()
            found, reason = launched(playwright)
            if found is None:
                pytest.skip(f"no headless Chromium: {reason}; installing one failed: {failed}")
        yield found
        found.close()
