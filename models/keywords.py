"""The K most frequent keywords and keyphrases of a corpus (paper §3.1, §3.3: NLTK), which start the codebook.

Tokenised by a regular expression and filtered by a stop list that lies in this package: nothing is ever downloaded.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files

from nltk.tokenize import RegexpTokenizer
from nltk.util import ngrams

from models.errors import CorpusError

WORDS = RegexpTokenizer(r"[^\W\d_]{2,}")
PHRASE_WORDS_MAX = 2


def stop_words() -> frozenset[str]:
    """English function words, and a few that say where a picture came from instead of what it shows."""
    lines = files("models").joinpath("data/stop_words.txt").read_text("utf-8").splitlines()
    return frozenset(w for line in lines if not line.startswith("#") for w in line.split())


def top_keywords(captions: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent words and phrases of two words, most frequent first; ties in alphabetical order.

    A phrase counts only where its words follow each other more often than chance has it (pointwise mutual information
    above 2 bits) and at least three times. Raises CorpusError where the captions have fewer than `count` of them.
    """
    stop = stop_words()
    words: Counter[str] = Counter()
    phrases: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        spoken = WORDS.tokenize(caption.lower())
        words.update(w for w in spoken if w not in stop)
        phrases.update(g for g in ngrams(spoken, PHRASE_WORDS_MAX) if stop.isdisjoint(g) and len(set(g)) > 1)
    counts: Counter[str] = Counter(words)
    counts.update({" ".join(p): n for p, n in phrases.items() if n >= 3 and _belongs_together(p, n, words)})
    if len(counts) < count:
        raise CorpusError(f"the captions have {len(counts)} keywords, {count} are needed: fewer codes, or more data")
    return sorted(counts, key=lambda k: (-counts[k], k))[:count]


def _belongs_together(phrase: Sequence[str], times: int, words: Counter[str]) -> bool:
    total = words.total()
    return math.log2(times * total / math.prod(words[w] for w in phrase)) > 2
