"""Measure how much there is to read in the core of the package: lines, calls of a step, circles, arguments.

    python tools/benchmarks/core_size.py [--calls]

Prints (a) the lines of the core's files, (b) the calls, functions and files of the package that one step of Tent
through ``wrap`` enters, on a network of one normalisation layer and on a ResNet-20, (c) functions of more than 60 lines
and files of more than 400, (d) circles of imports, with and without those under ``TYPE_CHECKING``, and (e) the number
of constructor arguments of every adapter, inherited ones included. The package is the one that Python imports: put
another checkout first on PYTHONPATH to measure that one.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: Files of the core, as patterns below the package; both the old layout and the new one.
CORE = (
    *(
        f"engine/{name}.py"
        for name in ("__init__", "engine", "prediction", "guard", "state", "method", "adaptive_network")
    ),
    *(f"adapters/{name}.py" for name in ("engine", "guard", "bad_batch", "descent", "parameter_vector", "episodes")),
    *(f"adapters/{name}.py" for name in ("state", "method", "adapter", "gradient", "sharding", "wrapper")),
)
#: Counted beside the core: the template that self-training methods share, the Lightning half of an adapter, the choice
#: of an optimizer, parameters as one vector, the checks of saved states, and what is built on the engine: schedules,
#: observers, exports, and the part of an adapted network that does not adapt.
BESIDE = (
    *(f"engine/{name}.py" for name in ("schedule", "observer", "export")),
    *(f"adapters/{name}.py" for name in ("handle", "window")),
    *(f"adapters/{name}.py" for name in ("self_training", "evaluation", "published")),
    *("models/vectors.py", "files/adaptation_states.py"),
)
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def lines_of(package: Path, patterns: tuple[str, ...] = CORE) -> dict[str, int]:
    """Return the number of lines of each file that a pattern fits."""
    files = sorted({file for pattern in patterns for file in package.glob(pattern)})
    return {str(file.relative_to(package)): len(file.read_text().splitlines()) for file in files}


def too_long(package: Path) -> list[str]:
    """Return functions and files that are longer than they may be."""
    found = []
    for file in sorted(package.rglob("*.py")):
        text, name = file.read_text(), str(file.relative_to(package))
        if (lines := len(text.splitlines())) > LONGEST_FILE:
            found.append(f"{name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    found.append(f"{name}:{node.lineno} {node.name}: {lines} lines")
    return found


def import_circles(package: Path, typing: bool = True, inside: bool = False) -> list[list[str]]:
    """Return the groups of modules that import each other in a circle.

    Args:
        package: Folder of the package.
        typing: Whether imports under ``TYPE_CHECKING`` count.
        inside: Whether imports inside functions count.
    """
    modules = {_module(file, package): file for file in package.rglob("*.py")}
    graph = {
        name: {
            target
            for node in _imports(ast.parse(file.read_text()).body, typing, inside)
            for target in _targets(node, name if file.name == "__init__.py" else name.rpartition(".")[0], modules)
            if target != name
        }
        for name, file in modules.items()
    }
    reached = {name: _reached(name, graph) for name in graph}
    groups = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]}
    return [list(group) for group in sorted(groups)]


def _module(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(body: list[ast.stmt], typing: bool, inside: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside:
            continue
        skipped = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing
        for part in ("orelse", "finalbody") if skipped else ("body", "orelse", "finalbody"):
            yield from _imports(getattr(node, part, []), typing, inside)
        for handler in getattr(node, "handlers", []):
            yield from _imports(handler.body, typing, inside)


def _targets(node: ast.Import | ast.ImportFrom, parent: str, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
        return
    start = ".".join(parent.split(".")[: len(parent.split(".")) - node.level + 1]) if node.level else ""
    base = ".".join(filter(None, (start, node.module)))
    for alias in node.names:
        whole = f"{base}.{alias.name}"
        if whole in modules or base in modules:
            yield whole if whole in modules else base


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]
    return found


def constructor_arguments(cls: type) -> set[str]:
    """Return the names of a constructor's arguments, those that ``**kwargs`` hands to the bases included."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
            break
    return names


def entered(package: Path, run: Callable[[], object]) -> list[str]:
    """Return the functions of the package that a call enters, as ``file:line function``, one for each call."""
    calls: list[str] = []

    def see(frame: Any, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(str(package)):
            calls.append(f"{Path(file).relative_to(package)}:{frame.f_code.co_firstlineno} {frame.f_code.co_name}")

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def step_calls(package: Path) -> dict[str, list[str]]:
    """Return what a step of Tent enters, by network."""
    import torch
    from torch import nn

    from ttalight.adapters import Tent
    from ttalight.models.cifar.cifar_resnet import cifar_resnet20

    torch.manual_seed(0)
    small = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    found = {}
    for name, net in (("one normalisation layer", small), ("ResNet-20", cifar_resnet20(num_classes=10))):
        adapted, images = Tent(lr=1e-5, reset="never").wrap(net.eval()), torch.rand(4, 3, 32, 32)
        for _ in range(4):
            adapted(images)
        found[name] = entered(package, lambda adapted=adapted, images=images: adapted(images))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", action="store_true", help="list the functions that a step enters, with their calls")
    arguments = parser.parse_args()
    import ttalight
    from ttalight import adapters

    warnings.simplefilter("ignore")
    package = Path(ttalight.__file__).parent
    print(f"package: {package}")
    lines = lines_of(package)
    print(f"(a) core: {sum(lines.values())} lines in {len(lines)} files")
    for name, count in (
        lines | {f"{key} (not counted)": value for key, value in lines_of(package, BESIDE).items()}
    ).items():
        print(f"    {count:5} {name}")
    print("(b) one step of Tent through wrap")
    for name, calls in step_calls(package).items():
        files = {call.split(":")[0] for call in calls}
        print(f"    {name}: {len(calls)} calls, {len(set(calls))} functions, {len(files)} files")
        for call in dict.fromkeys(calls) if arguments.calls else ():
            print(f"        {calls.count(call):3} {call}")
    long = too_long(package)
    print(f"(c) functions over {LONGEST_FUNCTION} lines and files over {LONGEST_FILE}: {len(long)}")
    print("".join(f"    {item}\n" for item in long), end="")
    print("(d) circles of imports")
    for label, options in (
        ("module level", {"typing": False}),
        ("with TYPE_CHECKING", {}),
        ("with those inside functions", {"inside": True}),
    ):
        circles = import_circles(package, **options)
        print(f"    {label}: {len(circles)}" + "".join(f"\n        {', '.join(circle)}" for circle in circles))
    public = [value for name in adapters.__all__ if isinstance(value := getattr(adapters, name), type)]
    counts = {cls.__name__: len(constructor_arguments(cls)) for cls in public if issubclass(cls, adapters.Adapter)}
    print(f"(e) constructor arguments: at most {max(counts.values())}")
    print("    " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1])))


if __name__ == "__main__":
    main()
