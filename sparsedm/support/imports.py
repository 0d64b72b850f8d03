"""Act when a module is imported for the first time, without importing it now."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType

_loaders: dict[str, type[SourceFileLoader]] = {}


def load_with(name: str, loader: type[SourceFileLoader]) -> None:
    """From now on the first import of the module `name` is done by `loader`.

    A module that is imported already, is absent, or is no Python file is left alone.
    """
    _loaders[name] = loader
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def follow(name: str, follower: str) -> None:
    """Import the module `follower` after the module `name`: at once, or when that is first imported."""

    class Loader(SourceFileLoader):
        def exec_module(self, module: ModuleType) -> None:
            super().exec_module(module)
            importlib.import_module(follower)

    if name in sys.modules:
        importlib.import_module(follower)
    else:
        load_with(name, Loader)


class _Finder:
    """Finds the modules of `_loaders` where Python finds them, and nothing else."""

    @staticmethod
    def find_spec(fullname: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname in _loaders else None
        if spec and type(spec.loader) is SourceFileLoader:
            spec.loader = _loaders[fullname](spec.loader.name, spec.loader.path)
        return spec
