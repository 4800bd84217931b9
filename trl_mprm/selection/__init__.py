"""Decide which rollouts are kept: rules, the exact threshold, passes over files, outputs with their evidence."""

from importlib import import_module


_NAMES = {
    "add_bis": "bis",
    "Selection": "datasets",
    "select": "datasets",
    "top_fraction": "datasets",
    "select_files": "files",
    "report_table": "report",
    "find_report": "report",
    "compare_rules": "comparison",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> object:
    """Import a name on first use, so that selecting from files loads neither torch nor `datasets`."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NAMES[name]}", __name__), name)
