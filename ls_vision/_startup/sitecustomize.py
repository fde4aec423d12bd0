"""Registers the models in child processes: `ls_vision.run` puts this folder on PYTHONPATH, and Python imports this.

The models are registered as soon as a process imports timm. Processes that do not use timm lose no time. A
`sitecustomize` of the environment, which this one shadows, is still run.
"""
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Optional

FOLDER = Path(__file__).resolve().parent
ROOT = str(FOLDER.parents[1])  # the folder that holds the package


class RegisterAfterTimm(MetaPathFinder):
    """Finds the same ls_vision as in the parent process, and imports it whenever timm has been imported."""

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
            self,
            name: str,
            path: Optional[Sequence[str]],
            target: Optional[ModuleType] = None,
    ) -> Optional[ModuleSpec]:
        if name == 'ls_vision':
            return PathFinder.find_spec(name, [ROOT])
        if name != 'timm' or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import ls_vision  # noqa: F401

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def run_shadowed() -> None:
    """Run the next `sitecustomize` on the path, if there is one."""
    spec = PathFinder.find_spec('sitecustomize', [folder for folder in sys.path if Path(folder).resolve() != FOLDER])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, RegisterAfterTimm())
run_shadowed()
