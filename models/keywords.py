"""The K most frequent keywords and keyphrases of a corpus (paper §3.1, §3.3: NLTK), which start the codebook.

Tokenised by a regular expression and filtered by a stop list that lies in this package: nothing is ever downloaded.
"""

from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from nltk.collocations import BigramAssocMeasures, BigramCollocationFinder
from nltk.probability import FreqDist
from nltk.tokenize import RegexpTokenizer
from nltk.util import bigrams

from models.errors import CorpusError

WORDS = RegexpTokenizer(r"[^\W\d_]{2,}")
PHRASE_TIMES_MIN, PHRASE_PMI_MIN = 3, 2.0
COUNTED_MAX = 2_000_000  # words, and as many phrases: a few hundred megabytes


def stop_words() -> frozenset[str]:
    """English function words, and a few that say where a picture came from instead of what it shows."""
    lines = files("models").joinpath("data/stop_words.txt").read_text("utf-8").splitlines()
    return frozenset(w for line in lines if not line.startswith("#") for w in line.split())


def top_keywords(captions: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent words and phrases of two words, most frequent first; ties in alphabetical order.

    A phrase counts only where its words follow each other more often than chance has it (NLTK's pointwise mutual
    information above 2 bits) and at least three times. Memory is bounded: of a web crawl's endless vocabulary only what
    keeps coming back stays counted. Raises CorpusError where the captions have fewer than `count` of them.
    """
    stop = stop_words()
    words: FreqDist[str] = FreqDist()
    phrases: FreqDist[tuple[str, ...]] = FreqDist()
    for caption in captions:
        spoken = WORDS.tokenize(caption.lower())
        words.update(w for w in spoken if w not in stop)
        phrases.update(g for g in bigrams(spoken) if stop.isdisjoint(g) and len(set(g)) > 1)
        for counted in (words, phrases):
            _forget_rare(counted)
    found = BigramCollocationFinder(words, phrases)
    found.apply_freq_filter(PHRASE_TIMES_MIN)
    counts: Counter[str] = Counter(words)
    counts.update({" ".join(p): phrases[p] for p in found.above_score(BigramAssocMeasures.pmi, PHRASE_PMI_MIN)})
    if len(counts) < count:
        raise CorpusError(f"the captions have {len(counts)} keywords, {count} are needed: fewer codes, or more data")
    return sorted(counts, key=lambda k: (-counts[k], k))[:count]


def listed(file: Path, count: int) -> list[str]:
    """The first `count` words of a word list, one a line: object tags, for example (paper, Table 2c).

    Raises CorpusError where the file cannot be read or has fewer.
    """
    try:
        words = list(dict.fromkeys(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()))
    except (OSError, UnicodeError) as error:
        raise CorpusError(f"{file} is no word list that can be read ({error}): one word a line, in UTF-8") from error
    if len(words) < count:
        raise CorpusError(f"{file} has {len(words)} words for {count} codes: --set codes={len(words)}, or more words")
    return words[:count]


def _forget_rare(counted: "FreqDist[Any]") -> None:
    """Halves an overfull count by what is rarest (Manku & Motwani 2002, lossy counting, without its bookkeeping)."""
    if len(counted) > COUNTED_MAX:
        for key, _ in counted.most_common()[COUNTED_MAX // 2 :]:
            del counted[key]
