"""`train`: stage 1 of TL;DR, from noisy and clean pairs to a captioner folder that `bootstrap` makes a bundle of.

Must not know Kafka; how a captioner learns is models/training.py's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stream.errors import TldrError
from stream.pair_sources import BadEntry, SourcePair, open_source

if TYPE_CHECKING:
    from models.captioner import CaptionerConfig
    from models.pair_store import TrainingPair
    from models.training import TrainingConfig


@dataclass(frozen=True)
class TrainResult:
    """A captioner on disk."""

    out: Path
    log: Path
    curves: Path
    version: str
    noisy_pairs: int
    clean_pairs: int
    excluded_pairs: int
    language_loss: float
    codes_used: int
    code_perplexity: float

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"captioner {self.version[:16]} in {self.out}"
        yield f"trained on {self.noisy_pairs:,} noisy and {self.clean_pairs:,} clean pairs, {self.excluded_pairs:,} held out"
        yield f"language loss {self.language_loss:.3f}; {self.codes_used} codes used, perplexity {self.code_perplexity:.0f}"
        yield f"log in {self.log}, curves in {self.curves}"
        yield f"next: tldr-stream bootstrap SOURCE --captioner {self.out} --out BUNDLE"


def train(
    noisy: Sequence[str],
    clean: Sequence[str],
    out: Path,
    *,
    architecture: str = "paper",
    settings: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_encoder: str | None = None,
    encoder_weights: str | None = None,
    decoder_weights: str | None = None,
    cache: Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    topic: str | None = None,
    topic_pairs: Callable[[], Iterable[SourcePair | BadEntry]] | None = None,
    progress: Callable[[str], None] = print,
) -> TrainResult | None:
    """Train a captioner on the pairs of `noisy` sources, then on those of `clean` ones, and write it to `out`.

    settings     NAME=VALUE, fields of CaptionerConfig and TrainingConfig that differ from the architecture's
    exclude      sources whose pairs are held out: every id in them is left out of the training data
    cache        folder for the features of a frozen encoder: a second training with the same images starts at once
    topic_pairs  more noisy pairs, those of the Kafka topic `topic`
    Returns      None in every process of a torchrun but the first.
    Raises       TldrError for an unknown architecture or setting; ModelError for too little data or missing weights.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from models.bundle import write_bundle
    from models.captioner import ARCHITECTURES, sized
    from models.device import choose_device, fingerprint
    from models.encoding import BATCH
    from models.loaded import CaptionerParts
    from models.text_embeddings import packaged_text_encoder
    from models.training import RECIPES, Pretrained, manifest_of, tidy, train_captioner

    if not noisy and topic_pairs is None:
        raise TldrError("nothing to pre-train on: name a source with --noisy, or a raw topic with --topic")
    if architecture not in ARCHITECTURES:
        raise TldrError(f'architecture "{architecture}" is unknown: choose one of {", ".join(ARCHITECTURES)}')
    # its reports of loaded weights are not for the user of this command
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    config, training = with_settings(ARCHITECTURES[architecture], replace(RECIPES[architecture], seed=seed), settings)
    left_out = set[str]()

    def kept(pairs: Iterator[TrainingPair]) -> Iterator[TrainingPair]:  # read by the first process only
        held_out = {pair.id for source in exclude for pair in _pairs(source)}
        for pair in pairs:
            if pair.id in held_out:
                left_out.add(pair.id)
            else:
                yield pair

    def all_noisy() -> Iterator[TrainingPair]:
        for source in noisy:
            yield from _pairs(source)
        if topic_pairs is not None:
            yield from _with_images(topic_pairs())

    work = out.with_name(f"{out.name}.training")
    trained = train_captioner(
        sized(config), training, kept(all_noisy()), kept(p for source in clean for p in _pairs(source)),
        Pretrained(text_encoder or str(packaged_text_encoder()), encoder_weights, decoder_weights), work, cache,
        progress, sources=[list(noisy), list(clean), sorted(exclude), topic],
    )  # fmt: skip
    if trained is None:
        return None
    parts = CaptionerParts(trained.captioner.cpu(), trained.vocabulary, trained.matching)
    about = {
        "architecture": architecture,
        "config": trained.captioner.config.as_dict(),
        "fingerprint": fingerprint(choose_device(), BATCH),
        **manifest_of(trained),
    }
    manifest = write_bundle(out, parts.contents(), about)
    tidy(work)
    last = trained.log[-1]
    return TrainResult(
        out, work / "log.jsonl", work / "curves.png", manifest.version, trained.pairs["noisy"], trained.pairs["clean"],
        len(left_out), last.language_loss, last.codes_used, last.code_perplexity,
    )  # fmt: skip


def with_settings(
    config: CaptionerConfig, training: TrainingConfig, settings: Sequence[str]
) -> tuple[CaptionerConfig, TrainingConfig]:
    """Both with the fields changed that `settings` (NAME=VALUE) name. Raises TldrError for a name or value that is none."""
    changes: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    known = {f.name: (f, 0) for f in fields(config)} | {f.name: (f, 1) for f in fields(training)}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise TldrError(f"--set {setting}: no such setting; {hint}")
        field, place = known[name]
        kind = getattr(field.type, "__name__", str(field.type))
        try:
            changes[place][name] = _value(kind, value)
        except (KeyError, ValueError):
            raise TldrError(
                f"--set {setting}: {name} takes a value of type {kind}, for example {field.default}"
            ) from None
    return replace(config, **changes[0]), replace(training, **changes[1])


def _value(kind: str, text: str) -> bool | int | float | str:
    if kind == "bool":
        return {"true": True, "false": False}[text.lower()]
    if kind == "int":
        return int(text)
    return float(text) if kind == "float" else text


def _with_images(entries: Iterable[SourcePair | BadEntry]) -> Iterator[TrainingPair]:
    """The pairs that carry their image; whatever else comes is passed over."""
    from models.pair_store import TrainingPair

    for entry in entries:
        if not isinstance(entry, BadEntry) and entry.image is not None:
            yield TrainingPair(entry.id, entry.caption, entry.image)


def _pairs(source: str) -> Iterator[TrainingPair]:
    return _with_images(open_source(source))
