"""Write docs/api.md: every public name with its signature and what its docstring says.

`python docs/make_api.py` needs all extras. A test holds the page against `api_page()`.
"""

from __future__ import annotations

import enum
import inspect
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ForwardRef

PAGE = Path(__file__).with_name("api.md")
MODULES = {
    "pagedkv": "The memory. Needs numpy and sortedcontainers only.",
    "pagedkv.eviction": "Eviction policies of the prefix cache.",
    "pagedkv.scheduler": "Who runs in the next step, with how many tokens.",
    "pagedkv.storage": "The K/V tensors. Needs the extra `torch`.",
    "pagedkv.attention": "Attention through block tables. Needs the extra `torch`.",
    "pagedkv.engine": "The reference engine. Needs the extra `engine`.",
    "pagedkv.engine.metrics": "What an engine counts.",
    "pagedkv.engine.run_record": "Recording a run.",
    "pagedkv.engine.speculation": "Drafts.",
    "pagedkv.simulations.traces": "Request traces. The simulator needs the extra `sim`.",
    "pagedkv.simulations.replay": "Replaying a trace.",
    "pagedkv.simulations.metrics": "The figures of a replay.",
    "pagedkv.simulations.reports": "The files of a replay.",
    "pagedkv.simulations.cost_models": "How long a step takes.",
    "pagedkv.testing": "Tests for allocators, schedulers and trace loaders. Needs the extra `testing`.",
}
WIDTH = 110
OBJECTS_OWN = "Initialize self."


def api_page() -> str:
    """The text of docs/api.md."""
    lines = [
        "# API",
        "",
        "Every public name, from the docstrings. Written by `python docs/make_api.py`: change docstrings, not this page.",
        "The pages in the [map](README.md) explain how the parts work together.",
        "",
        *(f"- [`{module}`](#{module.replace('.', '').lower()}): {what}" for module, what in MODULES.items()),
    ]
    for module, what in MODULES.items():
        lines += ["", f"## {module}", "", what]
        loaded = import_module(module)
        for name in sorted(loaded.__all__, key=str.lower):
            if not name.startswith("__"):
                lines += ["", *_entry(name, _public(loaded, name))]
    return "\n".join(lines) + "\n"


def _public(module: ModuleType, name: str) -> Any:
    """A name of a module; of a submodule, the module."""
    try:
        return getattr(module, name)
    except AttributeError:
        return import_module(f"{module.__name__}.{name}")


def _entry(name: str, thing: Any) -> Iterator[str]:
    """Heading, signature, docstring and members of one public name."""
    yield f"### {name}"
    if inspect.ismodule(thing):
        yield from _docstring(thing)
        return
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        yield from ("", f"`{name} = {_shown(thing)}`")
        return
    is_error = inspect.isclass(thing) and issubclass(thing, BaseException)
    is_enum = inspect.isclass(thing) and issubclass(thing, enum.Enum)
    if is_error:
        bases = [
            base.__name__ for base in thing.__mro__[1:] if base.__name__ not in ("Exception", "BaseException", "object")
        ]
        yield from ("", f"An error, also: {', '.join(bases)}.")
    elif is_enum:
        yield from ("", "Values: " + ", ".join(f"`{member.name}` (`{member.value!r}`)" for member in thing) + ".")
    elif not getattr(thing, "_is_protocol", False):
        yield from ("", "```python", _signature(name, thing), "```")
    yield from _docstring(thing)
    if inspect.isclass(thing) and not is_error and not is_enum:
        yield from _members(thing)


def _members(cls: type) -> Iterator[str]:
    """Public methods and properties that a class itself or a base of ours defines, one line each."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("pagedkv"):
            found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    rows = []
    for name in sorted(found):
        value = inspect.unwrap(getattr(found[name], "__func__", found[name]))
        if isinstance(value, property):
            rows.append(f"| `{name}` | {_summary(value)} |")
        elif inspect.isfunction(value):
            call = _signature(name, value, without_self=True, width=10_000)
            rows.append(f"| `{_in_table(call)}` | {_summary(value)} |")
    if rows:
        yield from ("", "| member | |", "|---|---|", *rows)


def _signature(name: str, thing: Any, *, without_self: bool = False, width: int = WIDTH) -> str:
    """`name(parameters) -> result`; a parameter on each line if it is wider than a line."""
    try:
        signature = inspect.signature(thing)
    except ValueError:
        return f"{name}(...)"
    parameters, kind = [], None
    for parameter in list(signature.parameters.values())[1 if without_self else 0 :]:
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parameters.append("*")
        kind = parameter.kind
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_type(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_shown(parameter.default)}"
        parameters.append(f"{star}{parameter.name}{annotation}{default}")
    result = (
        ""
        if inspect.isclass(thing) or signature.return_annotation in (signature.empty, None, "None")
        else f" -> {_type(signature.return_annotation)}"
    )
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) <= width:
        return line
    return f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){result}"


def _type(annotation: Any) -> str:
    """An annotation as it is written."""
    if isinstance(annotation, ForwardRef):
        return annotation.__forward_arg__
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _shown(value: Any) -> str:
    """A default or constant as people write it."""
    if inspect.isclass(value) or inspect.isroutine(value):
        return str(value.__name__)
    text = repr(value)
    return "..." if " at 0x" in text or "<" in text or len(text) > 200 else text


def _paragraphs(thing: Any) -> list[str]:
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    if text.startswith(OBJECTS_OWN):
        return []
    return [part for part in text.split("\n\n") if part and not part.lstrip().startswith(">>>")]


def _docstring(thing: Any) -> Iterator[str]:
    """The first paragraph as prose; of the others those that list arguments or fields, or what is raised."""
    paragraphs = _paragraphs(thing)
    if paragraphs and not paragraphs[0].startswith(f"{getattr(thing, '__name__', '')}("):
        yield from ("", paragraphs[0])
        init = inspect.getattr_static(thing, "__init__", None) if inspect.isclass(thing) else None
        lists = [
            part
            for part in [*paragraphs[1:], *_paragraphs(init)[1:]]
            if re.match(r"[\w`*.\[\]]+(, [\w`*.\[\]…]+)*:\s|Raises ", part)
        ]
        if lists:
            yield from ("", "```text", "\n\n".join(lists), "```")


def _summary(thing: Any) -> str:
    paragraphs = _paragraphs(thing)
    return _in_table(" ".join(paragraphs[0].split())) if paragraphs else ""


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(api_page())
