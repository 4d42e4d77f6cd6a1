"""File faults: a checkpoint is damaged, and a run in this process goes on from what is left."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.async_saver import save_checkpoint
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.checkpoint.format.manifest import NAME, digest
from dist_moe.config import Resolved
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import UserError
from dist_moe.train.schedule import learning_rate_schedule
from tests.dist.resumable import overrides_of, same_bits, started
from tests.dist.steps import one_step
from tests.faults.processes import lost
from tests.faults.row import Row

SAVED, LAST = (2, 4, 6), 8
CHANGES = (f"train.steps={LAST}", "train.schedule_steps=null", "checkpoint.interval=2")


@dataclass(frozen=True)
class Damage:
    """What was done to a checkpoint. files: below its folder; an error has to name one of them."""

    files: tuple[str, ...]
    what: str


Harm = Callable[[Path, random.Random], Damage]


def make_run(text: Path, folder: Path) -> Path:
    """`run`, of one worker, with checkpoints of steps 2, 4 and 6; `whole`, which went on to step 8 -> the folder."""
    with started(0, 1, overrides_of(text, folder / "run", *CHANGES)) as (resolved, training):
        go(resolved, training, 1, SAVED[-1])
    shutil.copytree(folder / "run", folder / "whole")
    with started(0, 1, overrides_of(text, folder / "whole", *CHANGES)) as (resolved, training):
        go(resolved, training, SAVED[-1] + 1, LAST)
    return folder


def go(resolved: Resolved, training: TrainState, first: int, last: int) -> None:
    """Steps `first` to `last`, and a checkpoint after every second."""
    for step in range(first, last + 1):
        rate = learning_rate_schedule(training.config).learning_rate(training.balancer.taken)
        one_step(resolved, training, step, rate=rate)
        if step % 2 == 0:
            save_checkpoint(training, step)


def inject(name: str, seed: int, text: Path, made: Path, folder: Path) -> Row:
    """Damage the newest checkpoint of a copy of the run, and go on -> what came of it."""
    began_s, draw = time.monotonic(), random.Random(seed)
    run = shutil.copytree(made / "run", folder)
    newest = run / f"checkpoints/step-{SAVED[-1]:06d}"
    before = snapshot(newest)
    damage = HARMS[name](newest, draw)
    now = snapshot(newest)
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    proof = f"{damage.what}; other contents of {', '.join(changed)}" if changed else ""
    wrong = refused(text, newest, folder, damage)
    onward, more = gone_on(text, run, made / "whole")
    shutil.rmtree(run)
    return Row("file", name, seed, False, proof, onward, wrong + more, time.monotonic() - began_s)


def snapshot(newest: Path) -> dict[str, str | None]:
    """The digest of every file by its path below the folder, and where a link leads instead."""
    return {
        str(path.relative_to(newest)): f"link to {path.readlink()}" if path.is_symlink() else digest(path)
        for path in newest.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(text: Path, newest: Path, folder: Path, damage: Damage) -> list[str]:
    """What is wrong where the damaged checkpoint is asked for by its path: it has to be refused, and the file named."""
    words = overrides_of(text, folder.with_name(f"{folder.name}-by-path"), *CHANGES, f"checkpoint.resume={newest}")
    try:
        with started(0, 1, words):
            return ["a damaged checkpoint was opened by its path"]
    except UserError as error:
        named = any(file in str(error) for file in damage.files)
        return [] if named else [f"refused, but {damage.files} is not named: {error}"]


def gone_on(text: Path, run: Path, whole: Path) -> tuple[str, list[str]]:
    """Go on with what is left -> from where, and what is not as if nothing had been."""
    with started(0, 1, overrides_of(text, run, *CHANGES)) as (resolved, training):
        first = training.balancer.taken
        go(resolved, training, first + 1, LAST)
    last = f"checkpoints/step-{LAST:06d}"
    wrong = [f"{name} differs" for name in same_bits(run / last, whole / last)]
    # The damaged one was made anew on the way; those before it are as they were, file by file.
    older = [f"checkpoints/step-{step:06d}" for step in SAVED[:-1]]
    wrong += lost({run / name: digest(whole / name / NAME) or "" for name in older})
    expected = SAVED[-2]
    return f"from step {first}", wrong if first == expected else [*wrong, f"it went on from step {first}"]


def a_file(newest: Path, draw: random.Random) -> Path:
    """One of its files, the larger ones as likely as the small ones."""
    return draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))


def told(newest: Path, path: Path, what: str) -> Damage:
    """A manifest that is damaged may blame another file, or none; the checkpoint is named then."""
    return Damage((newest.name if path.name == NAME else str(path.relative_to(newest)),), what)


def truncated(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    size = path.stat().st_size
    length = draw.randrange(size)
    with path.open("r+b") as file:
        file.truncate(length)
    return told(newest, path, f"{size} bytes cut to {length}")


def bit_flipped(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    place, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))
    return told(newest, path, f"bit {bit} of byte {place}")


def overwritten(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    size = path.stat().st_size
    place = draw.randrange(size)
    length = min(size - place, 1 + draw.randrange(4096))
    with path.open("r+b") as file:
        file.seek(place)
        file.write(draw.randbytes(length))
    return told(newest, path, f"{length} random bytes from byte {place} on")


def missing(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    path.unlink()
    return told(newest, path, "removed")


def emptied(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    path.write_bytes(b"")
    return told(newest, path, "emptied")


def appended(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    count = 1 + draw.randrange(100)
    with path.open("ab") as file:
        file.write(draw.randbytes(count))
    return told(newest, path, f"{count} bytes more")


def of_another_step(newest: Path, draw: random.Random) -> Damage:
    """Only files that differ between the steps: the others would be no damage."""
    other = newest.with_name(f"step-{draw.choice(SAVED[:-1]):06d}")
    names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    name = draw.choice([name for name in names if digest(newest / name) != digest(other / name)])
    shutil.copy2(other / name, newest / name)
    return told(newest, newest / name, f"replaced by that of step {step_of(other)}")


def swapped(newest: Path, draw: random.Random) -> Damage:
    one, other = draw.sample(sorted(path for path in newest.rglob("*") if path.is_file() and path.name != NAME), 2)
    spare = newest / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    names = (str(one.relative_to(newest)), str(other.relative_to(newest)))
    return Damage(names, f"{one.name} and {other.name} in each other's place")


def linked(newest: Path, draw: random.Random) -> Damage:
    path = a_file(newest, draw)
    elsewhere = newest.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return told(newest, path, "a link to what it was")


def strange(newest: Path, draw: random.Random) -> Damage:
    path = newest / draw.choice(("state", "model")) / f"rank-{draw.randrange(1, 99999):05d}.safetensors"
    shutil.copy2(newest / "state/rank-00000.safetensors", path)
    return told(newest, path, "one that nobody wrote")


def edited(newest: Path, draw: random.Random) -> Damage:
    """One digit or letter of the manifest."""
    path = newest / NAME
    text = path.read_text()
    place = draw.choice([index for index, letter in enumerate(text) if letter.isalnum()])
    other = draw.choice([letter for letter in "0123456789abcdef" if letter != text[place]])
    path.write_text(text[:place] + other + text[place + 1 :])
    return told(newest, path, f"character {place} of the manifest")


def renamed(newest: Path, draw: random.Random) -> Damage:
    """The folder of another step under this one's name."""
    other = newest.with_name(f"step-{draw.choice(SAVED[:-1]):06d}")
    shutil.rmtree(newest)
    shutil.copytree(other, newest)
    return Damage((newest.name,), f"replaced by the folder of step {step_of(other)}")


HARMS: dict[str, Harm] = {
    "truncated": truncated,
    "one bit flipped": bit_flipped,
    "overwritten with random bytes": overwritten,
    "removed": missing,
    "emptied": emptied,
    "longer": appended,
    "the same file of another step": of_another_step,
    "two files in each other's place": swapped,
    "a link in place of a file": linked,
    "a file that nobody wrote": strange,
    "the folder of another step": renamed,
    "a manifest that somebody edited": edited,
}
