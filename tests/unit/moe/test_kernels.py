"""Which implementations an MoE layer has on a device."""

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dist_moe.config.sections.model import KernelsName
from dist_moe.errors import ConfigError
from dist_moe.model import liger
from dist_moe.moe import kernels
from dist_moe.moe.kernels import ANY_DEVICE, CPU, Kernels, check_kernels, kernels_for, missing_for_triton

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)
OF_TRITON = Kernels(CPU.gather_sum, CPU.swiglu)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder, the only one of PATH, of a machine with a package `triton` and one `liger_kernel`."""
    for package in ("triton", "liger_kernel"):
        folder = tmp_path / "packages" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "triton_kernels", lambda: OF_TRITON)
    forget()
    yield programs
    monkeypatch.undo()
    importlib.invalidate_caches()
    forget()


def forget() -> None:
    """Look at the machine again."""
    missing_for_triton.cache_clear()
    liger.missing.cache_clear()


def install(programs: Path, name: str) -> None:
    """Install a compiler."""
    (programs / name).write_text("#!/bin/sh\n")
    (programs / name).chmod(0o755)
    forget()


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_kernels_of_triton_need_a_compiler(machine: Path, compiler: str) -> None:
    assert missing_for_triton() == liger.missing() == "a C compiler, and neither gcc nor clang is installed"
    assert kernels_for(GPU) is ANY_DEVICE and kernels_for(HOST) is CPU
    install(machine, compiler)
    assert missing_for_triton() == liger.missing() == ""
    assert kernels_for(GPU) is OF_TRITON and kernels_for(HOST) is CPU


def test_the_compiler_of_a_variable_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/opt/compiler")
    assert missing_for_triton() == ""


@pytest.mark.parametrize(("package", "wanted"), [("triton", "the package triton"), ("liger_kernel", "liger-kernel")])
def test_packages_that_are_not_installed_are_named(
    machine: Path, package: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(machine, "gcc")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert liger.missing() == f"{wanted}, which is not installed"
    assert (kernels_for(GPU) is ANY_DEVICE) == (package == "triton")


def test_names_choose(machine: Path) -> None:
    install(machine, "gcc")
    choices: dict[KernelsName, Kernels] = {"auto": OF_TRITON, "torch": ANY_DEVICE, "triton": OF_TRITON}
    for name, wanted in choices.items():
        check_kernels(name, GPU)
        assert kernels_for(GPU, name) is wanted and kernels_for(HOST, name) is CPU


def test_kernels_that_cannot_run_are_refused_by_name(machine: Path) -> None:
    with pytest.raises(ConfigError, match=r"moe_kernels=triton needs a C compiler, .* install it, or use auto"):
        check_kernels("triton", GPU)
    install(machine, "gcc")
    with pytest.raises(ConfigError, match="moe_kernels=triton needs a GPU, and the device is cpu; use auto"):
        check_kernels("triton", HOST)


def test_what_a_gpu_goes_without_is_logged(machine: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_kernels("auto", HOST)
        check_kernels("torch", GPU)
        assert not caplog.records
        check_kernels("auto", GPU)
        assert "slower without Triton's kernels, which need a C compiler" in caplog.text
        caplog.clear()
        install(machine, "gcc")
        check_kernels("auto", GPU)
    assert not caplog.records
