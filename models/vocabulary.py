"""Text ⇄ word pieces. A bundle carries its own tokenizer: the pieces of a larger vocabulary that its corpus uses.

Single characters are always kept, so that a word never seen in training is spelled out instead of lost.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, START, STOP, MASK = range(len(SPECIAL))
TEXTS_AT_ONCE = 10_000
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


class Vocabulary:
    """A WordPiece tokenizer with fixed places for its special pieces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    @property
    def pieces(self) -> list[str]:
        """All pieces, by number."""
        return sorted(self.tokenizer.get_vocab(), key=self.tokenizer.get_vocab().__getitem__)

    def encode(self, texts: Sequence[str], pieces_max: int) -> list[list[int]]:
        """At most `pieces_max` piece numbers a text, without special pieces. Only the text's beginning is looked at."""
        cut = [text[: 16 * pieces_max] for text in texts]  # a 100 kB caption must not cost 100 kB of work
        return [e.ids[:pieces_max] for e in self.tokenizer.encode_batch(cut, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Words of the pieces, special ones dropped; tags such as united_nations_member in one piece again."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).replace(" _ ", "_")

    def save(self, file: Path) -> None:
        """As Hugging Face's tokenizer.json: data, nothing to execute."""
        file.write_text(self.tokenizer.to_str(), encoding="utf-8")


def load(file: Path) -> Vocabulary:
    """The vocabulary that `Vocabulary.save` wrote."""
    return Vocabulary(Tokenizer.from_file(str(file)))


def of_pieces(pieces: Iterable[str]) -> Vocabulary:
    """Lower-casing WordPiece over the special pieces, the single characters and `pieces`, in that order."""
    ordered = dict.fromkeys([*SPECIAL, *CHARACTERS, *(f"##{c}" for c in CHARACTERS), *pieces])
    tokenizer = Tokenizer(WordPiece({p: i for i, p in enumerate(ordered)}, unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens(list(SPECIAL))
    return Vocabulary(tokenizer)


def prune(large: Tokenizer, texts: Iterable[str], times_min: int = 2) -> Vocabulary:
    """The pieces of `large` that occur at least `times_min` times in `texts`; rarer words are spelled by others.

    times_min  0: all pieces, with the special ones in their fixed places.
    """
    counts: Counter[int] = Counter()
    remaining = iter(texts) if times_min else iter(())
    while some := list(islice(remaining, TEXTS_AT_ONCE)):
        counts.update(i for e in large.encode_batch(some, add_special_tokens=False) for i in e.ids)
    names = {number: piece for piece, number in large.get_vocab().items()}
    return of_pieces(names[i] for i in sorted(names) if counts[i] >= times_min and names[i] not in SPECIAL)
