"""What a training says of itself: one JSON object a line, and the picture of its curves."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

PHASES = ("noisy", "clean", "done")


@dataclass(frozen=True)
class Entry:
    """Means over the steps since the entry before. `step` counts from the start of its phase, up to `steps`."""

    phase: str  # "noisy" or "clean"
    step: int
    steps: int
    epoch: float
    language_loss: float  # nats a word piece
    commitment_loss: float
    codes_used: int
    code_perplexity: float
    rate: float  # learning rate
    images_per_s: float
    seconds: float  # since the training, or the part of it after a restart, began


class TrainingLog:
    """A file of entries. After a restart, what stands behind the checkpoint is written again, so it is cut off first."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, entry: Entry) -> None:
        """Append, and hand it to the operating system: a killed process loses nothing."""
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(entry)) + "\n")

    def read(self) -> list[Entry]:
        """All entries; a last line that was cut off by a crash is left out."""
        if not self.file.exists():
            return []
        lines = self.file.read_text("utf-8").splitlines(keepends=True)
        return [Entry(**json.loads(line)) for line in lines if line.endswith("\n")]

    def cut_behind(self, phase: str, step: int) -> None:
        """Keep what was written up to step `step` of `phase`, and nothing later."""
        end = (PHASES.index(phase), step)
        kept = [e for e in self.read() if (PHASES.index(e.phase), e.step) <= end]
        self.file.write_text("".join(json.dumps(asdict(e)) + "\n" for e in kept), "utf-8")


def draw(entries: list[Entry], png: Path) -> None:
    """Losses, and codes in use, along the steps; the clean phase is shaded."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    noisy_steps = max((e.steps for e in entries if e.phase == "noisy"), default=0)
    steps = [e.step + (noisy_steps if e.phase == "clean" else 0) for e in entries]
    figure, (losses, codes) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    losses.plot(steps, [e.language_loss for e in entries], label="language modelling (nats a piece)")
    losses.plot(steps, [e.commitment_loss for e in entries], label="commitment")
    losses.set_ylabel("loss")
    codes.plot(steps, [e.codes_used for e in entries], label="codes in use")
    codes.plot(steps, [e.code_perplexity for e in entries], label="perplexity of their use")
    codes.set_xlabel("step")
    for axes in (losses, codes):
        axes.set_ylim(bottom=0)
        if noisy_steps and steps and steps[-1] > noisy_steps:
            axes.axvspan(noisy_steps, steps[-1], alpha=0.15, color="grey", label="clean fine-tuning")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png, dpi=110)
    plt.close(figure)
