"""File faults: a checkpoint is damaged, and a run in this process resumes from the previous one."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_moe.checkpoint.async_saver import save_checkpoint
from dist_moe.checkpoint.format.layout import step_of
from dist_moe.checkpoint.format.manifest import MANIFEST_NAME, digest_if_readable
from dist_moe.config import Resolved
from dist_moe.engine.train_state import TrainState
from dist_moe.errors import UserError
from dist_moe.train.schedule import learning_rate_schedule
from tests.dist.resumable import overrides_of, same_bits, started
from tests.dist.steps import one_step
from tests.faults.processes import find_lost
from tests.faults.row import Row

SAVED, LAST = (2, 4, 6), 8
CHANGES = (f"train.steps={LAST}", "train.schedule_steps=null", "checkpoint.interval=2")


@dataclass(frozen=True)
class Damage:
    """What was done to a checkpoint.

    Attributes:
        files: Below its folder; the error must name one of them.
        what: The damage in words.
    """

    files: tuple[str, ...]
    what: str


DamageFunction = Callable[[Path, random.Random], Damage]


def make_run(text: Path, folder: Path) -> Path:
    """Make `run`, one worker with checkpoints of steps 2, 4 and 6, and `whole`, resumed to step 8 -> the folder."""
    with started(0, 1, overrides_of(text, folder / "run", *CHANGES)) as (resolved, training):
        train_steps(resolved, training, 1, SAVED[-1])
    shutil.copytree(folder / "run", folder / "whole")
    with started(0, 1, overrides_of(text, folder / "whole", *CHANGES)) as (resolved, training):
        train_steps(resolved, training, SAVED[-1] + 1, LAST)
    return folder


def train_steps(resolved: Resolved, training: TrainState, first: int, last: int) -> None:
    """Make steps `first` to `last`, with a checkpoint after each even one."""
    for step in range(first, last + 1):
        rate = learning_rate_schedule(training.config).learning_rate(training.balancer.steps_taken)
        one_step(resolved, training, step, rate=rate)
        if step % 2 == 0:
            save_checkpoint(training, step)


def inject(name: str, seed: int, text: Path, made: Path, folder: Path) -> Row:
    """Damage the newest checkpoint of a copy of the run, and resume -> the result."""
    started_s, draw = time.monotonic(), random.Random(seed)
    run = shutil.copytree(made / "run", folder)
    newest = run / f"checkpoints/step-{SAVED[-1]:06d}"
    before = digests_of(newest)
    damage = DAMAGES[name](newest, draw)
    after = digests_of(newest)
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]
    evidence = f"{damage.what}; changed {', '.join(changed)}" if changed else ""
    failures = check_refused(text, newest, folder, damage)
    recovery, more = resume(text, run, made / "whole")
    shutil.rmtree(run)
    return Row("file", name, seed, False, evidence, recovery, failures + more, time.monotonic() - started_s)


def digests_of(newest: Path) -> dict[str, str | None]:
    """The digest of every file by its path below the folder; the target of a link instead."""
    return {
        str(path.relative_to(newest)): f"link to {path.readlink()}" if path.is_symlink() else digest_if_readable(path)
        for path in newest.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def check_refused(text: Path, newest: Path, folder: Path, damage: Damage) -> list[str]:
    """Resume from the damaged checkpoint by path -> failures: it must be refused with an error that names the file."""
    overrides = overrides_of(text, folder.with_name(f"{folder.name}-by-path"), *CHANGES, f"checkpoint.resume={newest}")
    try:
        with started(0, 1, overrides):
            return ["a damaged checkpoint was loaded by its path"]
    except UserError as error:
        named = any(file in str(error) for file in damage.files)
        return [] if named else [f"refused, but the error does not name {damage.files}: {error}"]


def resume(text: Path, run: Path, whole: Path) -> tuple[str, list[str]]:
    """Resume to the last step -> from which step, and the differences from the undisturbed run."""
    with started(0, 1, overrides_of(text, run, *CHANGES)) as (resolved, training):
        first = training.balancer.steps_taken
        train_steps(resolved, training, first + 1, LAST)
    last = f"checkpoints/step-{LAST:06d}"
    failures = [f"{name} differs" for name in same_bits(run / last, whole / last)]
    # The damaged checkpoint has been saved again; older ones must be unchanged, file by file.
    older = [f"checkpoints/step-{step:06d}" for step in SAVED[:-1]]
    failures += find_lost({run / name: digest_if_readable(whole / name / MANIFEST_NAME) or "" for name in older})
    expected = SAVED[-2]
    return f"from step {first}", failures if first == expected else [*failures, f"it resumed from step {first}"]


def choose_file(newest: Path, draw: random.Random) -> Path:
    """One of the checkpoint's files, with equal probability."""
    return draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))


def damage_to(newest: Path, path: Path, what: str) -> Damage:
    """The damage of one file; a damaged manifest may name any file in the error, which names the checkpoint then."""
    return Damage((newest.name if path.name == MANIFEST_NAME else str(path.relative_to(newest)),), what)


def truncated(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    size = path.stat().st_size
    length = draw.randrange(size)
    with path.open("r+b") as file:
        file.truncate(length)
    return damage_to(newest, path, f"truncated from {size} to {length} bytes")


def bit_flipped(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    offset, bit = draw.randrange(path.stat().st_size), draw.randrange(8)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
    return damage_to(newest, path, f"bit {bit} of byte {offset} flipped")


def overwritten(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    size = path.stat().st_size
    offset = draw.randrange(size)
    length = min(size - offset, 1 + draw.randrange(4096))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(draw.randbytes(length))
    return damage_to(newest, path, f"{length} random bytes at offset {offset}")


def deleted(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    path.unlink()
    return damage_to(newest, path, "deleted")


def emptied(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    path.write_bytes(b"")
    return damage_to(newest, path, "emptied")


def appended(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    count = 1 + draw.randrange(100)
    with path.open("ab") as file:
        file.write(draw.randbytes(count))
    return damage_to(newest, path, f"{count} bytes appended")


def of_another_step(newest: Path, draw: random.Random) -> Damage:
    """Only a file that differs between the steps; replacing another changes nothing."""
    other = newest.with_name(f"step-{draw.choice(SAVED[:-1]):06d}")
    names = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file()]
    name = draw.choice(
        [name for name in names if digest_if_readable(newest / name) != digest_if_readable(other / name)]
    )
    shutil.copy2(other / name, newest / name)
    return damage_to(newest, newest / name, f"replaced by that of step {step_of(other)}")


def swapped(newest: Path, draw: random.Random) -> Damage:
    one, other = draw.sample(
        sorted(path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST_NAME), 2
    )
    spare = newest / "spare"
    one.rename(spare)
    other.rename(one)
    spare.rename(other)
    names = (str(one.relative_to(newest)), str(other.relative_to(newest)))
    return Damage(names, f"{one.name} and {other.name} swapped")


def linked(newest: Path, draw: random.Random) -> Damage:
    path = choose_file(newest, draw)
    elsewhere = newest.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return damage_to(newest, path, "replaced by a link to it")


def unlisted(newest: Path, draw: random.Random) -> Damage:
    path = newest / draw.choice(("state", "model")) / f"rank-{draw.randrange(1, 99999):05d}.safetensors"
    shutil.copy2(newest / "state/rank-00000.safetensors", path)
    return damage_to(newest, path, "an additional file")


def edited(newest: Path, draw: random.Random) -> Damage:
    """Replace one digit or letter of the manifest."""
    path = newest / MANIFEST_NAME
    text = path.read_text()
    position = draw.choice([index for index, letter in enumerate(text) if letter.isalnum()])
    other = draw.choice([letter for letter in "0123456789abcdef" if letter != text[position]])
    path.write_text(text[:position] + other + text[position + 1 :])
    return damage_to(newest, path, f"character {position} of the manifest changed")


def renamed(newest: Path, draw: random.Random) -> Damage:
    """Replace the checkpoint by the folder of another step."""
    other = newest.with_name(f"step-{draw.choice(SAVED[:-1]):06d}")
    shutil.rmtree(newest)
    shutil.copytree(other, newest)
    return Damage((newest.name,), f"replaced by the folder of step {step_of(other)}")


DAMAGES: dict[str, DamageFunction] = {
    "truncated": truncated,
    "one bit flipped": bit_flipped,
    "overwritten with random bytes": overwritten,
    "deleted": deleted,
    "emptied": emptied,
    "bytes appended": appended,
    "the same file of another step": of_another_step,
    "two files swapped": swapped,
    "a link in place of a file": linked,
    "an additional file": unlisted,
    "the folder of another step": renamed,
    "an edited manifest": edited,
}
