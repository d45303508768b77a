"""Stage 1 of TL;DR (paper §3.1): pre-train the codebook captioner on noisy pairs, then fine-tune it on clean ones.

The first process prepares: it copies the pairs to disk, gives the captioner its starting values and writes them as the first
checkpoint. Then every process begins where the checkpoint stands, whether that is the start or the middle of an epoch: a
resumed training, and one in several processes, is the same training.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models import checkpoint, starting, vocabulary
from models.batches import Draws, Examples, Part, Rows, at_most
from models.captioner import Captioner, CaptionerConfig, sized
from models.checkpoint import Position
from models.codebook import look_up, usage
from models.device import choose_device, repeatable, seeded
from models.distributed import joined, rank, summed, wait, world
from models.encoding import BATCH, PaddedEncoder
from models.errors import CorpusError
from models.images import decode
from models.matching import MatchingHead, calibrate, train_head
from models.pair_store import THREADS, PairStore, TrainingPair
from models.pretrained import load_decoder, load_encoder, sizes_of_decoder, sizes_of_encoder, tokenizer_of
from models.text_embeddings import TextEncoder
from models.training_log import PHASES, Entry, TrainingLog, draw
from models.vocabulary import Vocabulary, prune

Progress = Callable[[str], None]
CALIBRATION_SHARE = 0.08
CAPTIONS_AT_ONCE = 8192
PROGRESS_INTERVAL_S = 10.0
MANIFEST_ENTRIES_MAX = 100


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are the recipe that two cores can afford, found by docs/tried.md's comparisons."""

    epochs_noisy: int = 10
    epochs_clean: int = 1
    epochs_matching: int = 25
    batch: int = 64  # pairs of a step, of all processes together
    accumulation: int = 1  # parts in which a process computes its share of a batch
    rate_noisy: float = 2e-3
    rate_clean: float = 1e-4
    warm_up_share: float = 0.05
    decay_per_epoch: float = 0.0  # factor of the rate after each epoch; 0: a cosine down to nothing
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    clean_learns: str = "decoder"  # or "all": a small clean set would draw all codes to what it shows
    words_dropped: float = 0.1
    images_hidden: float = 0.1  # share of pairs of which the decoder is shown the caption alone
    caption_repeats_max: int = 15  # of one caption in an epoch, 0: any; a crawl repeats its stock phrases
    meaning_weight: float = 1.0  # of the loss that keeps the captions' embeddings readable from the quantised tokens
    augment: bool = False  # RandAugment and crops, where the encoder learns; cached features are only mirrored
    codebook_start: str = "keywords"  # "xavier", "uniform", or the path of a word list
    codebook_update: str = "ema"  # or "gradient"
    ema_decay: float = 0.97
    commitment: float = 0.25
    revive_share: float = 0.6  # of the noisy steps; later revivals would take codes from a decoder that knows them
    revive_below: float = 0.05
    ridge: float = 100.0  # 0: the projection starts at random
    pieces_times_min: int = 2  # occurrences that keep a word piece in the vocabulary; 0: the whole vocabulary
    precision: str = "float32"  # or "bfloat16"
    activation_checkpoints: bool = False
    matching_pairs_max: int = 200_000
    log_every: int = 10  # steps
    checkpoint_every_s: float = 60.0
    seed: int = 0


# The paper gives these for pre-training its vision-language models (§4); of stage 1 it says only the losses and the phases.
PAPER_RECIPE = TrainingConfig(
    epochs_noisy=20, epochs_clean=5, batch=1260, rate_noisy=3e-4, rate_clean=1e-5, decay_per_epoch=0.85, clean_learns="all",
    words_dropped=0.0, images_hidden=0.0, caption_repeats_max=0, meaning_weight=0.0, augment=True,
    codebook_update="gradient", revive_share=0.0, ridge=0.0, pieces_times_min=0, precision="bfloat16",
)  # fmt: skip
RECIPES = {
    "paper": PAPER_RECIPE,
    "authors": replace(PAPER_RECIPE, codebook_start="uniform"),
    "tiny": TrainingConfig(),
}


@dataclass(frozen=True)
class Pretrained:
    """Folders or hub ids that a training starts from. decoder: a BERT; encoder: a ViT, a BLIP, or lite0's checkpoint."""

    text_encoder: str
    encoder: str | None = None
    decoder: str | None = None


@dataclass
class Trained:
    """A captioner, its words, its matching head, and how it came about."""

    captioner: Captioner
    vocabulary: Vocabulary
    matching: MatchingHead
    keywords: list[str]
    log: list[Entry]
    config: TrainingConfig
    pairs: dict[str, int]


class Learner(nn.Module):
    """The captioner and what learns beside it: a reader of the captions' embeddings from the mean quantised token."""

    def __init__(self, captioner: Captioner, training: TrainingConfig, meaning_width: int) -> None:
        super().__init__()
        self.captioner = captioner
        self.reader = nn.Linear(captioner.config.code_width, meaning_width) if training.meaning_weight else None
        self.meaning_weight = training.meaning_weight
        self.codes_counted: Tensor
        self.register_buffer("codes_counted", torch.zeros(captioner.config.codes, dtype=torch.int64))

    def forward(
        self, images: Tensor, inputs: Tensor, targets: Tensor, hidden: Tensor, meanings: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(language, commitment, weighted meaning loss, tokens, indices) of a Part."""
        captioner = self.captioner
        features = captioner.encoder(images.float()) if images.ndim == 4 else images
        language, commitment, tokens, indices = captioner.losses(features, inputs, targets, hidden)
        meaning = torch.zeros((), device=tokens.device)
        if self.reader is not None:
            quantised = tokens + (F.embedding(indices, captioner.quantiser.codebook.codes) - tokens).detach()
            read = F.normalize(self.reader(quantised.mean(1)).float(), dim=-1)
            meaning = self.meaning_weight * (1 - (read * meanings).sum(-1).mean())
        return language, commitment, meaning, tokens, indices


def train_captioner(
    config: CaptionerConfig, training: TrainingConfig, noisy: Iterable[TrainingPair], clean: Iterable[TrainingPair],
    pretrained: Pretrained, work: Path, cache: Path | None = None, progress: Progress = print, *, sources: object = None,
    after_phase: Callable[[str, Captioner, Vocabulary], None] | None = None,
) -> Trained | None:  # fmt: skip
    """Train as the paper does: codebook from keywords, noisy pairs first, clean ones after. Goes on where it was killed.

    work     folder of this training: pairs, checkpoint, log.jsonl and curves.png; `tidy` leaves only the last two.
    cache    folder for what depends on the data alone (features of a frozen encoder, embeddings of the captions), so that the
             next training need not compute it; default: `work`.
    sources  what the pairs were read from: a training is gone on with only where this, and all else, is as it was.
    after_phase  is shown the captioner after "noisy" and after "clean", for measurements; it must leave it as it is.
    Returns  None in every process but the first.
    Raises   CorpusError for too few pairs, missing weights, or a `work` that another training has begun; ShapeError for more
             processes than GPUs.
    """
    with joined(), seeded(training.seed), repeatable():
        if rank() == 0:
            settings = [config.as_dict(), asdict(training), asdict(pretrained), sources]
            _prepare(config, training, noisy, clean, pretrained, work, cache or work, settings, progress)
        wait()
        return _train(training, pretrained, work, cache or work, progress, after_phase)


def tidy(work: Path) -> None:
    """Delete what only a training that is not over needs."""
    for name in ("checkpoint.safetensors", "settings.json", "tokenizer.json", "keywords.json"):
        (work / name).unlink(missing_ok=True)
    for file in [*work.glob("features-*.npy"), *work.glob("meanings-*.npy")]:
        file.unlink()
    for name in ("noisy", "clean"):
        shutil.rmtree(work / name, ignore_errors=True)


def manifest_of(trained: Trained) -> dict[str, object]:
    """The parameters and results of a training, for a bundle's manifest."""
    every = -(-len(trained.log) // MANIFEST_ENTRIES_MAX) or 1
    return {
        "training": asdict(trained.config),
        "pairs": trained.pairs,
        "log": [asdict(e) for e in trained.log[every - 1 :: every]],
        "keywords": trained.keywords,
    }


def _prepare(
    config: CaptionerConfig, training: TrainingConfig, noisy: Iterable[TrainingPair], clean: Iterable[TrainingPair],
    pretrained: Pretrained, work: Path, cache: Path, settings: object, progress: Progress,
) -> None:  # fmt: skip
    """Everything up to the first checkpoint, as far as it is not done yet."""
    work.mkdir(parents=True, exist_ok=True)
    begun, now = work / "settings.json", json.dumps(settings, indent=1, sort_keys=True, default=str)
    if begun.exists() and begun.read_text("utf-8") != now:
        raise CorpusError(
            f"{work} holds an unfinished training with other settings: delete it, or choose another --out"
        )
    begun.write_text(now, "utf-8")
    if (work / "checkpoint.safetensors").exists():
        return
    (work / "log.jsonl").unlink(missing_ok=True)
    if pretrained.encoder and config.encoder != "lite":
        config = sizes_of_encoder(config, pretrained.encoder)
    if pretrained.decoder:
        config = sizes_of_decoder(config, pretrained.decoder)
    stores = []
    for phase, pairs in (("noisy", noisy), ("clean", clean)):
        stores.append(
            PairStore(work / phase) if (work / phase).exists() else PairStore.write(work / phase, pairs, config.side)
        )
        progress(f"{len(stores[-1]):,} {phase} pairs on disk")
    if not len(stores[0]):
        raise CorpusError("no pair of the noisy corpus could be decoded: check its shards")
    text_encoder = TextEncoder(pretrained.text_encoder)
    tokenizer = tokenizer_of(pretrained.decoder) if pretrained.decoder else text_encoder.tokenizer
    words = prune(tokenizer, (c for s in stores for c in s.captions()), training.pieces_times_min)
    keywords = starting.words_of_codes(training.codebook_start, config.codes, stores)
    words.save(work / "tokenizer.json")
    (work / "keywords.json").write_text(json.dumps(keywords), "utf-8")
    progress(f"{len(words):,} word pieces, codes from {training.codebook_start}")

    torch.manual_seed(training.seed)
    captioner = Captioner(sized(config, vocabulary=len(words)))
    load_encoder(captioner, pretrained.encoder)
    for store in stores:
        if config.encoder_frozen and len(store):
            _compute_features(captioner, store, cache / _features_name(captioner, store), progress)
        if training.meaning_weight and len(store):
            _compute_meanings(store, text_encoder, cache / _meanings_name(store, pretrained))
    examples = _examples(captioner, words, stores[0], training, pretrained, cache)
    sentences = (
        text_encoder.embed(list(examples.store.captions(range(min(starting.SAMPLE, len(examples.store))))))
        if examples.meanings is None
        else examples.meanings[: starting.SAMPLE].astype(np.float32)
    )
    axes = starting.Axes(sentences, config.code_width)
    starting.start_codes(captioner, training.codebook_start, keywords, text_encoder, axes)
    starting.start_projection(captioner, examples, sentences, axes, training.ridge, progress)
    if pretrained.decoder:
        load_decoder(captioner, words, pretrained.decoder)
    else:
        starting.start_words(captioner, words, text_encoder)
    captioner.quantiser.codebook.learn_by(training.codebook_update)
    learner = Learner(captioner, training, sentences.shape[1])
    checkpoint.save(work / "checkpoint.safetensors", learner, None, Position("noisy", 0), captioner.config)


def _train(
    training: TrainingConfig, pretrained: Pretrained, work: Path, cache: Path, progress: Progress,
    after_phase: Callable[[str, Captioner, Vocabulary], None] | None,
) -> Trained | None:  # fmt: skip
    """From the checkpoint to the end, in every process."""
    at, config = checkpoint.position(work / "checkpoint.safetensors")
    words = vocabulary.load(work / "tokenizer.json")
    captioner = Captioner(config)
    codebook = captioner.quantiser.codebook
    codebook.learn_by(training.codebook_update)
    codebook.decay, codebook.commitment = training.ema_decay, training.commitment
    if training.activation_checkpoints:
        captioner.checkpoint_activations()
    stores = {phase: PairStore(work / phase) for phase in ("noisy", "clean")}
    learner = Learner(captioner, training, checkpoint.width(work / "checkpoint.safetensors", "reader.weight"))
    checkpoint.load(work / "checkpoint.safetensors", learner)
    examples = {p: _examples(captioner, words, store, training, pretrained, cache) for p, store in stores.items()}
    learner.to(choose_device())
    log = TrainingLog(work / "log.jsonl")
    if rank() == 0:
        log.cut_behind(at.phase, at.step)
    if at != Position("noisy", 0):
        progress(f"going on at step {at.step} of the {at.phase} phase")
    for phase in PHASES[PHASES.index(at.phase) : -1]:
        if len(stores[phase]) and (training.epochs_noisy if phase == "noisy" else training.epochs_clean):
            _run_phase(learner, examples[phase], phase, at.step, training, work, log, progress)
            if after_phase is not None and rank() == 0:
                after_phase(phase, captioner.eval(), words)
        at = Position(PHASES[PHASES.index(phase) + 1], 0)
        if rank() == 0:
            checkpoint.save(work / "checkpoint.safetensors", learner, None, at, config)
    wait()
    if rank() != 0:
        return None
    draw(log.read(), work / "curves.png")
    codebook.learn_by("ema")  # from here on the codes are what they are
    captioner.eval().requires_grad_(False)
    text_encoder = TextEncoder(pretrained.text_encoder)
    head = _matching(captioner, words, list(examples.values()), text_encoder, training, progress)
    keywords = json.loads((work / "keywords.json").read_text("utf-8"))
    return Trained(
        captioner, words, head, keywords, log.read(), training, {phase: len(store) for phase, store in stores.items()}
    )


def _run_phase(
    learner: Learner, examples: Examples, phase: str, first: int, training: TrainingConfig, work: Path, log: TrainingLog,
    progress: Progress,
) -> None:  # fmt: skip
    """All steps of a phase from number `first` on."""
    number, codebook, config = PHASES.index(phase), learner.captioner.quantiser.codebook, learner.captioner.config
    device = codebook.codes.device
    draws = Draws(
        training.seed, training.batch, training.accumulation, training.caption_repeats_max, training.words_dropped,
        training.images_hidden, training.augment,
    )  # fmt: skip
    epochs = training.epochs_noisy if phase == "noisy" else training.epochs_clean
    epoch_steps = len(examples.epoch(draws, number, 0))
    steps = epochs * epoch_steps
    all_learn = phase == "noisy" or training.clean_learns == "all"
    learner.requires_grad_(all_learn)
    learner.captioner.encoder.requires_grad_(all_learn and not config.encoder_frozen)
    learner.captioner.decoder.requires_grad_(True)
    learner.train()
    learner.captioner.encoder.train(not config.encoder_frozen)
    learning = [p for p in learner.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=0.0, weight_decay=training.weight_decay)
    if first:
        checkpoint.load_optimiser(work / "checkpoint.safetensors", learner, optimiser)
    model = DistributedDataParallel(learner, broadcast_buffers=False) if world() > 1 else learner
    began = saved = said = mark = time.perf_counter()
    sums = torch.zeros(2, device=device)
    learner.codes_counted.zero_()
    images = 0

    for step, (rows, parts) in _ahead(examples, draws, number, first, steps, epoch_steps):
        rate = _rate(training, phase, step, steps, epoch_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        torch.manual_seed(_number(training.seed, number, step, rank()))  # of dropout
        optimiser.zero_grad(set_to_none=True)
        seen: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            last = part is parts[-1]
            with model.no_sync() if not last and isinstance(model, DistributedDataParallel) else nullcontext():
                language, commitment, meaning, tokens, indices = _forward(model, part, training, device)
                # DDP takes the mean over the processes; the batch's loss is the sum of its weighted parts
                loss = part.language_share * language + part.share * (commitment + meaning)
                (world() * loss).backward()
            sums += torch.stack([part.language_share * language.detach(), part.share * commitment.detach()])
            seen.append((tokens.detach(), indices))
        nn.utils.clip_grad_norm_(learning, training.clip_norm)
        optimiser.step()
        tokens, indices = (torch.cat(together) for together in zip(*seen, strict=True))
        if all_learn:
            codebook.follow(tokens, indices)
            if phase == "noisy" and step < training.revive_share * steps:
                generator = torch.Generator().manual_seed(_number(training.seed, number, step, 0, 2))
                codebook.revive(tokens, training.revive_below, generator)
        learner.codes_counted += torch.bincount(indices.ravel(), minlength=config.codes)
        images += len(rows)

        done = step + 1
        if done % training.log_every and done != steps:
            continue
        window = (done - 1) % training.log_every + 1
        language_loss, commitment_loss = (summed(sums) / window).tolist()
        used = usage(summed(learner.codes_counted))
        now = time.perf_counter()
        entry = Entry(
            phase, done, steps, round(done / epoch_steps, 4), language_loss, commitment_loss, used.used, used.perplexity,
            rate, round(images / (now - mark), 1), round(now - began, 1),
        )  # fmt: skip
        sums.zero_()
        learner.codes_counted.zero_()
        images, mark = 0, now
        if rank() != 0:
            continue
        log.add(entry)
        if now - said >= PROGRESS_INTERVAL_S or done == steps:
            said = now
            progress(_said(entry, epochs, (steps - done) * (now - began) / (done - first)))
        if now - saved >= training.checkpoint_every_s and done != steps:
            saved = now
            checkpoint.save(work / "checkpoint.safetensors", learner, optimiser, Position(phase, done), config)


def _ahead(
    examples: Examples, draws: Draws, phase: int, first: int, steps: int, epoch_steps: int
) -> Iterator[tuple[int, tuple[Rows, list[Part]]]]:
    """(step, its rows and parts); the next step's images are decoded while this one's are learnt from."""

    def batches() -> Iterator[tuple[int, Rows]]:
        for epoch in range(first // epoch_steps, steps // epoch_steps):
            for place, rows in enumerate(examples.epoch(draws, phase, epoch)):
                if epoch * epoch_steps + place >= first:
                    yield epoch * epoch_steps + place, rows

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for step, rows in batches():
            following = (step, rows, pool.submit(examples.parts, rows, draws, phase, step))
            if waiting is not None:
                yield waiting[0], (waiting[1], waiting[2].result())
            waiting = following
        if waiting is not None:
            yield waiting[0], (waiting[1], waiting[2].result())


def _forward(
    model: nn.Module, part: Part, training: TrainingConfig, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    low = training.precision == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=low):
        parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = model(
            *(t.to(device) for t in (part.images, part.inputs, part.targets, part.hidden, part.meanings))
        )
    return parts


def _rate(training: TrainingConfig, phase: str, step: int, steps: int, epoch_steps: int) -> float:
    """Learning rate of a step: a linear warm-up, then a decay by the epoch (paper) or a cosine."""
    peak = training.rate_noisy if phase == "noisy" else training.rate_clean
    warm = max(1, round(training.warm_up_share * steps))
    if step < warm:
        return peak * (step + 1) / warm
    if training.decay_per_epoch:
        return float(peak * training.decay_per_epoch ** (step // epoch_steps))
    return float(peak * 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm))))


def _said(entry: Entry, epochs: int, left_s: float) -> str:
    left = (
        f"{left_s:.0f} s" if left_s < 120 else f"{left_s / 60:.0f} min" if left_s < 7200 else f"{left_s / 3600:.1f} h"
    )
    return (
        f"{entry.phase} epoch {entry.epoch:.1f}/{epochs}, step {entry.step}/{entry.steps}: language loss "
        f"{entry.language_loss:.3f}, commitment {entry.commitment_loss:.3f}, {entry.codes_used} codes in use "
        f"(perplexity {entry.code_perplexity:.0f}), {entry.images_per_s:.0f} images/s, {left} left"
    )


def _number(*places: int) -> int:
    """A seed for a place in the training."""
    return int(np.random.SeedSequence(places).generate_state(1)[0])


def _examples(
    captioner: Captioner,
    words: Vocabulary,
    store: PairStore,
    training: TrainingConfig,
    pretrained: Pretrained,
    cache: Path,
) -> Examples:
    config = captioner.config
    features = _kept(cache / _features_name(captioner, store)) if config.encoder_frozen and len(store) else None
    meanings = _kept(cache / _meanings_name(store, pretrained)) if training.meaning_weight and len(store) else None
    return Examples(store, words, config.caption_pieces_max, config.side, features, meanings)


def _kept(file: Path) -> NDArray[np.float16]:
    kept: NDArray[np.float16] = np.load(file, mmap_mode="r", allow_pickle=False)
    return kept


def _features_name(captioner: Captioner, store: PairStore) -> str:
    digest = hashlib.sha256(f"{store.digest}/{captioner.config.side}".encode())
    for tensor in captioner.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return f"features-{digest.hexdigest()[:16]}.npy"


def _meanings_name(store: PairStore, pretrained: Pretrained) -> str:
    return f"meanings-{hashlib.sha256(f'{store.digest}/{pretrained.text_encoder}'.encode()).hexdigest()[:16]}.npy"


def _compute_features(captioner: Captioner, store: PairStore, file: Path, progress: Progress) -> None:
    """Features of all images, computed once where the encoder does not learn."""
    if file.exists():
        progress(f"features of {len(store):,} images read from {file.name}")
        return
    encoder, side, started = PaddedEncoder(captioner, choose_device()), captioner.config.side, time.perf_counter()
    shape = (len(store), captioner.config.tokens, captioner.config.feature_width)
    with _filled(file, shape) as features, ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(store), 16 * encoder.batch):
            rows = range(first, min(first + 16 * encoder.batch, len(store)))
            pixels = list(pool.map(lambda row: decode(store.image(row), side), rows))
            features[rows.start : rows.stop] = encoder.features(pixels)
            speed = rows.stop / (time.perf_counter() - started)
            progress(f"features {rows.stop:,}/{len(store):,}, {speed:.0f} images/s")


def _compute_meanings(store: PairStore, text_encoder: TextEncoder, file: Path) -> None:
    if file.exists():
        return
    with _filled(file, (len(store), text_encoder.bert.config.hidden_size)) as meanings:
        for first in range(0, len(store), CAPTIONS_AT_ONCE):
            rows = range(first, min(first + CAPTIONS_AT_ONCE, len(store)))
            meanings[rows.start : rows.stop] = text_encoder.embed(list(store.captions(rows)))


@contextmanager
def _filled(file: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.float16]]:
    """An array on disk that stands at `file` once it is complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    array = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    yield array
    array.flush()
    partial.replace(file)


@torch.inference_mode()
def _vectors(captioner: Captioner, examples: Examples, rows: Rows) -> NDArray[np.uint16]:
    """(n, L) index vectors of examples."""
    device = captioner.quantiser.codebook.codes.device
    parts = [np.empty((0, captioner.config.tokens), np.uint16)]
    for first in range(0, len(rows), BATCH):
        some = rows[first : first + BATCH]
        if examples.features is not None:
            features = torch.from_numpy(examples.features[some].astype(np.float32)).to(device)
        else:
            images = np.stack([decode(examples.store.image(int(row)), examples.side) for row in some])
            features = captioner.encoder(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float())
        tokens = captioner.quantiser.tokens(features)
        parts.append(look_up(tokens, captioner.quantiser.codebook.codes).cpu().numpy().astype(np.uint16))
    return np.concatenate(parts)


def _matching(
    captioner: Captioner, words: Vocabulary, examples: Sequence[Examples], text_encoder: TextEncoder,
    training: TrainingConfig, progress: Progress,
) -> MatchingHead:  # fmt: skip
    """The bundle's own ITM head, fitted to the index vectors of the trained captioner."""
    codebook = captioner.quantiser.codebook.codes.detach().cpu().clone()
    head = MatchingHead(len(codebook), codebook.shape[1], len(words))
    if training.epochs_matching == 0:
        return head.eval()
    rng = np.random.default_rng(training.seed)
    hashes = np.concatenate([e.store.caption_hashes for e in examples])
    order = rng.permutation(len(hashes))[: training.matching_pairs_max]
    if training.caption_repeats_max:
        order = at_most(hashes, training.caption_repeats_max, order)
    noisy_count = len(examples[0].store)
    order = np.concatenate(
        [order[order < noisy_count], order[order >= noisy_count]]
    )  # in the order of the vectors below
    vectors = np.concatenate(
        [_vectors(captioner, e, own) for e, own in zip(examples, _split(order, noisy_count), strict=True)]
    )
    captions = [c for e, own in zip(examples, _split(order, noisy_count), strict=True) for c in e.store.captions(own)]
    width = head.word_bag.weight.shape[1]
    embedded = text_encoder.words(words.pieces)
    with torch.no_grad():
        placed = starting.standardised(starting.Axes(embedded, width).along(embedded))
        head.word_bag.weight.copy_(starting.widened(placed, width))
    apart, fitted = np.split(rng.permutation(len(captions)), [int(CALIBRATION_SHARE * len(captions))])
    chosen = [captions[i] for i in fitted]
    sentences = text_encoder.embed(chosen)
    meanings = F.normalize(starting.widened(starting.Axes(sentences, width).along(sentences), width), dim=-1)
    loss = train_head(
        head, words, codebook, vectors[fitted], chosen, meanings, epochs=training.epochs_matching, seed=training.seed
    )
    rest = apart if len(apart) >= 50 else fitted
    calibrate(head, words, codebook, vectors[rest], [captions[i] for i in rest], training.seed)
    progress(
        f"matching head: contrastive loss {loss:.3f}, slope {float(head.slope):.2f}, offset {float(head.offset):.2f}"
    )
    return head.eval()


def _split(order: Rows, noisy_count: int) -> tuple[Rows, Rows]:
    return order[order < noisy_count], order[order >= noisy_count] - noisy_count
