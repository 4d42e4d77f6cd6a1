"""The commands that reproduce the measurements of the documentation."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dist_moe.cli.messages import report_user_errors
from dist_moe.cli.options import ConfigFile, OutFolder, Overrides, Repetitions, Verbose, path_argument, path_option

Seeds = Annotated[int, typer.Option(min=1, max=1000, help="Number of seeds.")]

study_app = typer.Typer(help="Reproduce the measurements of the documentation.", no_args_is_help=True)


def make_folder(out: Path) -> None:
    """Make the folder for the results, before the minutes or hours that these take."""
    from dist_moe.errors import needs_folder

    with needs_folder(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)


@study_app.command()
def controllers(
    out: OutFolder = Path("runs/study/controllers"),
    experts: Annotated[
        list[int] | None, typer.Option(help="Number of experts, 8, 64, 256 or 896; may be repeated; by default all.")
    ] = None,
    seeds: Seeds = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, and by default 8 experts: seconds.")] = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast and how steadily each policy balances random, drifting scores; takes minutes on a CPU."""
    from time import perf_counter

    from dist_moe.errors import needs_folder
    from dist_moe.study.controllers.results import write_results
    from dist_moe.study.controllers.simulation import make_plan, run_plan
    from dist_moe.study.controllers.table import notes, terminal_tables

    console = Console()
    with report_user_errors():
        plan = make_plan(experts or (), seeds, quick)
        make_folder(out)
    began = perf_counter()
    runs = run_plan(plan, lambda line: console.print(line, highlight=False))
    with report_user_errors(), needs_folder(out, "--out"):
        write_results(out, plan, runs, perf_counter() - began)
    for table in terminal_tables(plan, runs):
        console.print(table)
    for line in (*notes(plan), f"Results: {out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@study_app.command()
def policies(
    config: ConfigFile,
    overrides: Overrides = None,
    out: OutFolder = Path("runs/study/policies"),
    seeds: Seeds = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Concurrent runs, of one thread each.")] = 2,
    verbose: Verbose = False,
) -> None:
    """Train CONFIG under every policy with every seed, and compare loss and load; continues an interrupted study."""
    from dist_moe.errors import needs_folder
    from dist_moe.study.comparison import findings, terminal_table, write_comparison
    from dist_moe.study.policies import plan_runs, train_all

    console = Console()
    with report_user_errors():
        runs = plan_runs(config, out, seeds, overrides or [])
        make_folder(out)
        results = train_all(runs, jobs, lambda line: console.print(line, highlight=False, markup=False))
        with needs_folder(out, "--out"):
            write_comparison(out, runs, results)
    console.print(terminal_table(results))
    for line in (*findings(results), f"Results: {out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@study_app.command()
def exchange(repetitions: Repetitions = 50, verbose: Verbose = False) -> None:
    """Time the all-to-all of MPI and of gloo, on the ranks of the mpirun that starts this command."""
    from dist_moe.study.exchange import run

    with report_user_errors():
        for table in run(repetitions):
            Console().print(table)


@study_app.command()
def hops(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a rank; may be repeated (default: 16, 128, 1024).")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Elements of a token's row, in fp32.")] = 1024,
    repetitions: Repetitions = 10,
    out: Annotated[Path | None, path_option("FILE", "File for the results, as JSON.")] = None,
    verbose: Verbose = False,
) -> None:
    """Time an MoE layer between hosts, flat and hierarchical, on the ranks of the launcher that starts this command."""
    from dist_moe.study.hops import TOKENS, Size, run

    with report_user_errors():
        for table in run([Size(count, top_k, width) for count in tokens or TOKENS], repetitions, out):
            Console().print(table)


@study_app.command()
def load(
    run_dirs: Annotated[list[Path], path_argument("RUN_DIR...", "Folders of runs of one model.")],
    out: Annotated[Path, path_option("FILE", "PNG file to write.")] = Path("load.png"),
    layer: Annotated[
        int | None, typer.Option(min=0, help="MoE layer of the heat maps; the least balanced one by default.")
    ] = None,
    dark: Annotated[bool, typer.Option("--dark", help="Use colors for a dark page.")] = False,
) -> None:
    """Draw MaxVio over steps and the load of each expert from the metrics of runs."""
    from dist_moe.study.load import draw_load_figure, read_histories

    with report_user_errors():
        draw_load_figure(out, read_histories(run_dirs), layer, "dark" if dark else "light")
    Console().print(f"Figure: {out}", markup=False, highlight=False, soft_wrap=True)


GRIDS = {
    "nlu": "Adaptive expert weights on language understanding: accuracy, load and experts per token on four tasks.",
    "loss_free": "Loss-Free Balancing on mixed text: rates, gates and auxiliary losses; computation batches.",
    "dynamic": "What threshold routing gives at equal experts per token, and at equal time.",
    "specialization": "Whether balancing blurs the experts' preferences for domains of text.",
}
"""The studies of many runs, by the name of their module and plan."""


def _add_grid(name: str, about: str) -> None:
    from dist_moe.text import listed

    @study_app.command(name.replace("_", "-"), help=f"{about} Resumes; takes hours on a CPU.")
    def run(
        preset: Annotated[str, typer.Option(metavar="NAME", help="Size of the study, small or full.")] = "small",
        plan: Annotated[
            Path | None, path_option("FILE", f"Plan of the study (default: configs/study/{name}.yaml).")
        ] = None,
        out: Annotated[
            Path | None, path_option("FOLDER", f"Folder for results and figures (default: runs/study/{name}).")
        ] = None,
        runs: Annotated[
            Path | None, path_option("FOLDER", f"Folder for the runs (default: runs/study/{name}/runs).")
        ] = None,
        case: Annotated[
            list[str] | None, typer.Option(metavar="NAME", help="Train the cells of this case; may be repeated.")
        ] = None,
        seed: Annotated[
            list[int] | None, typer.Option(min=0, help="Train the cells of this seed; may be repeated.")
        ] = None,
        minutes: Annotated[
            float | None, typer.Option(min=0, help="Begin no run that would probably end later than this.")
        ] = None,
        check: Annotated[
            bool, typer.Option("--check", help="Train one cell of each checked arm again, and compare.")
        ] = False,
        recorded: Annotated[
            Path | None, path_option("FOLDER", f"Results to compare with --check (default: docs/study/{name}).")
        ] = None,
        verbose: Verbose = False,
    ) -> None:
        from importlib import import_module

        from dist_moe.errors import UserError
        from dist_moe.study.grid.run import Part, Place, check_study, default_plan, run_study

        console = Console()

        def log(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        study = import_module(f"dist_moe.study.{name}").STUDY
        own = Path("runs/study") / (name if preset == "small" else f"{name}-{preset}")
        place = Place(plan or default_plan(name), out or own, runs or own / ("check" if check else "runs"))
        with report_user_errors():
            if not check:
                run_study(study, place, Part(preset, case or (), seed or (), minutes), log)
                log(f"Page: {place.page}")
                return
            found = check_study(study, place, recorded or Path("docs/study") / name, preset, log)
            for one in found:
                verdict = "agrees" if one.agrees else "DIFFERS"
                log(
                    f"{verdict}: {one.cell}: {one.measure} recorded {one.recorded:.6g}, repeated {one.repeated:.6g}, "
                    f"accepted difference {one.accepted:.3g}"
                )
            if differing := [f"{one.cell}: {one.measure}" for one in found if not one.agrees]:
                raise UserError(f"the repeated cells differ in {listed(differing, last='and', most=5)}")


for _name, _about in GRIDS.items():
    _add_grid(_name, _about)
