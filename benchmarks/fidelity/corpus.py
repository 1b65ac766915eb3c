"""Sequences of real text: the demo's code and prose (launch/demo_corpus.py) by source, and text made bad on purpose."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inrun_megatron.errors import UserError
from launch import demo_corpus

SEED = 1234  # of the demo's corpus, which it is the same text as

# A hundred-odd words each of two other languages, written for this benchmark.
OTHER_LANGUAGES = (
    "Am frühen Morgen lag noch Nebel über dem Fluss, als die Fischer ihre Boote ins Wasser schoben. Niemand sprach "
    "ein Wort. Der alte Hannes hatte schon am Abend zuvor die Netze geflickt und sie zum Trocknen über den Zaun "
    "gehängt. Nun trug er sie auf der Schulter zum Ufer, während sein Enkel die Ruder brachte. Es war kalt, doch die "
    "beiden kannten es nicht anders, denn im Herbst begann die Arbeit immer vor der Sonne. Wer zu spät kam, fand an "
    "den guten Stellen keinen Platz mehr und musste mit leeren Körben nach Hause gehen. ",
    "Le marché du samedi commençait toujours avant le lever du jour. Les paysans arrivaient avec leurs charrettes "
    "pleines de choux, de pommes et de fromages, et chacun cherchait la meilleure place près de la fontaine. Ma "
    "grand-mère connaissait tous les vendeurs par leur prénom. Elle goûtait, elle discutait, elle faisait semblant "
    "de partir, puis elle revenait en souriant. Nous, les enfants, nous attendions sous les arcades, où le boulanger "
    "nous donnait parfois un morceau de brioche encore chaude que nous mangions en silence. ",
)
BOILERPLATE = (
    "This page and all of its contents are provided for general information only. All rights reserved. By using this "
    "site you accept our terms of service, our privacy policy and our use of cookies. Click here to continue. "
)


@dataclass(frozen=True)
class Source:
    """Text of one module or help topic, of one domain (`code` or `prose`)."""

    name: str
    domain: str
    text: str


@cache
def records() -> dict[str, list[dict[str, Any]]]:
    """The demo's documents by domain and target."""
    return demo_corpus.build(SEED, 600_000, 65_536)


def sources(domain: str) -> list[Source]:
    """The training sources of a domain, longest first."""
    texts: dict[str, str] = {}
    for record in records()[domain]:
        texts[record["module"]] = texts.get(record["module"], "") + record["text"]
    found = [Source(name, domain, text) for name, text in texts.items()]
    return sorted(found, key=lambda source: (-len(source.text), source.name))


def stream(name: str) -> str:
    """All documents of a domain or target, joined."""
    return "".join(record["text"] for record in records()[name])


def rows(text: str, count: int, length: int, seed: int | None = None) -> Tensor:
    """`count` rows of `length + 1` bytes `[count, length + 1]`: consecutive, or with a seed at random of all there are.

    Raises:
        UserError: the text is too short.
    """
    data = torch.tensor(list(text.encode("utf-8")), dtype=torch.long)
    available = len(data) // (length + 1)
    if available < count:
        raise UserError(
            f"{count} sequences of {length + 1} bytes asked of a text that has {available}; use a complete CPython"
        )
    cut = data[: available * (length + 1)].view(available, length + 1)
    if seed is None:
        return cut[:count]
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return cut[chosen]


def shuffled_tokens(clean: Tensor, seed: int) -> Tensor:
    """The same rows with the bytes of each in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([row[torch.randperm(len(row), generator=generator)] for row in clean])


def wrong_language(count: int, length: int, seed: int) -> Tensor:
    """Rows of German and French in turn; where the text ends it begins again, elsewhere in the row."""
    order = random.Random(seed)
    result = []
    for i in range(count):
        data = list(OTHER_LANGUAGES[i % len(OTHER_LANGUAGES)].encode("utf-8"))
        start = order.randrange(len(data))
        result.append(torch.tensor((data * 3)[start : start + length + 1]))
    return torch.stack(result)


def boilerplate(count: int, length: int) -> Tensor:
    """The same row over and over."""
    data = list((BOILERPLATE * 4).encode("utf-8"))[: length + 1]
    return torch.tensor(data).expand(count, -1).clone()
