"""What a resumed run must share with the ledger that it continues, because rows refer to it.

A row's (dataset, sample) means item `sample` of the GPTDataset's index arrays, so that their content decides, not what
was asked for: a longer run asks for more samples, and gets the same arrays as long as the data need not be repeated more
often. Where they must be, megatron-core shuffles all epochs anew, and a sample's number means another text.
"""

from __future__ import annotations

from typing import Any

from inrun_megatron.errors import UserError
from inrun_megatron.ledger.checks import setting
from inrun_megatron.wording import counted, flag_of

# What is the same of each target and dataset, in the words of a message; and the flag of launch/pretrain.py that gives it.
_FILE = {"idx_sha256": "an .idx file of SHA-256", "bin_digest": "a .bin file of digest"}
_TARGET = {
    "name": "the name",
    **_FILE,
    "sequences": "this number of sequences:",
    "tokens_sha256": "tokens of SHA-256",
    "num_tokens": "this number of loss tokens:",
}
_DATASET = {"name": "the name", "index": "the number", **_FILE, "weight": "the weight"}
_GIVEN_BY = {"target": "--shapley-target", "dataset": "--data-path"}

# Flags of the data that decide what the loss of the targets is, the same for all of them: values are changes of that loss.
_LOSS = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask")

# All values of a ledger are of one kind: setting -> what it was before a run.json named it. Base point and age of the direction
# may vary: steps/ records them.
_KIND = {"granularity": "sample", "estimator": "first_order", "credit": "step", "optimizer": "auto"}

# megatron-core's description of a GPTDataset -> the flag that decides it
_FLAGS = {
    "random_seed": "--seed",
    "sequence_length": "--seq-length",
    "split": "--split",
    "tokenizer": "--tokenizer-type",
}


def check_resumable(run: dict[str, Any], resumed: dict[str, Any]) -> None:
    """UserError where rows of the resumed run would refer to something else than those of `run`.

    Both as in run.json. Targets, their loss, datasets and the kind of the values are the same; layout, versions, other configuration, and where the data lies may differ.
    """
    _check_same("target", run, resumed, _TARGET)
    _check_loss(run, resumed)
    _check_same("dataset", run, resumed, _DATASET)
    for position, (before, after) in enumerate(zip(run["datasets"], resumed["datasets"], strict=True)):
        _check_samples(f"dataset {position} ({before.get('name')})", before, after, run, resumed)
    for name, default in _KIND.items():
        before, after = (setting(of, name, default, group="shapley") for of in (run, resumed))
        if before != after:
            raise UserError(
                f"the ledger of run {run['run_id']} holds values of {name} {before}, the resumed run has {after}; resume "
                f"with {name} {before} (--shapley-{name}), or choose another directory (--shapley-dir)"
            )


def _check_same(what: str, run: dict[str, Any], resumed: dict[str, Any], words: dict[str, str]) -> None:
    old, new, run_id = run[f"{what}s"], resumed[f"{what}s"], run["run_id"]
    remedy = f"resume with the {what}s as they were ({_GIVEN_BY[what]}), or choose another directory (--shapley-dir)"
    if len(old) != len(new):
        raise UserError(
            f"the ledger of run {run_id} has {counted(len(old), what)}, the resumed run {len(new)}; {remedy}"
        )
    for position, (before, after) in enumerate(zip(old, new, strict=True)):
        for key, word in words.items():
            if key in before and key in after and before[key] != after[key]:
                raise UserError(
                    f"{what} {position} ({before.get('name')}) of run {run_id} had {word} {before[key]}, the resumed "
                    f"run has {after[key]}; {remedy}"
                )


def _check_loss(run: dict[str, Any], resumed: dict[str, Any]) -> None:
    """The targets' tokens are masked, placed and attended to as before. A target of an own loop may not say how."""
    for before, after in zip(run["targets"], resumed["targets"], strict=True):
        for name in _LOSS:
            if name in before and name in after and before[name] != after[name]:
                was, now = (flag_of(name if of[name] else f"no_{name}") for of in (before, after))
                raise UserError(
                    f"the ledger of run {run['run_id']} holds values towards the loss of target {before['name']} under {was}, "
                    f"the resumed run has {now}; resume with {was}, or choose another directory (--shapley-dir)"
                )


def _check_samples(
    name: str, before: dict[str, Any], after: dict[str, Any], run: dict[str, Any], resumed: dict[str, Any]
) -> None:
    """The index arrays are the same, and so is the tokenizer, whose end of document cuts samples into segments."""
    if "index_sha256" not in before or "index_sha256" not in after:
        return
    old, new = before["description"], after["description"]
    if before["index_sha256"] == after["index_sha256"] and old["tokenizer"] == new["tokenizer"]:
        return
    causes = [
        f"{flag} was {old[key]}, now {new[key]}" for key, flag in _FLAGS.items() if old[key] != new[key]
    ]
    remedy = "resume with what it was"
    if not causes and old["num_samples"] != new["num_samples"]:
        for key in ("train_iters", "global_batch_size"):
            was, now = (side["configuration"]["training"].get(key) for side in (run, resumed))
            if was != now:
                causes.append(f"{flag_of(key)} was {was}, now {now}")
        causes.append(
            f"the data is repeated more or less often for {new['num_samples']} samples than for {old['num_samples']}"
        )
        remedy += " (to stop a long run early: --exit-interval)"
    if not causes:
        causes = ["the installed megatron-core or numpy draws another order"]
    raise UserError(
        f"{name} of run {run['run_id']}: its sample numbers would mean other text than in the ledger: "
        f"{', '.join(causes)}; {remedy}, or choose another directory (--shapley-dir)"
    )
