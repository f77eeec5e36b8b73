"""What the system says of a file, in the words of an error message."""

from __future__ import annotations

import os
from pathlib import Path

from pagedkv.errors import ConfigError

__all__ = ["about", "describe_os_error", "make_folder", "one_line"]


def describe_os_error(error: OSError) -> str:
    """What was found where a file should be."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return "a directory" if isinstance(error, IsADirectoryError) else (error.strerror or type(error).__name__).lower()


def about(path: Path, error: OSError) -> OSError:
    """The same error of another file. Python picks the subclass by the number."""
    return error if error.errno is None else OSError(error.errno, error.strerror, str(path))


def one_line(error: Exception) -> str:
    """An error as a line that begins with the file where there is one; Python's own begins with a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return str(error)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder to write to before the work whose outcome goes there. Raises ConfigError that names the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{option}: expected a folder, found a file in the way of {folder}") from None
    except OSError as error:
        raise ConfigError(f"{option}: expected a folder that can be made, found {one_line(error)}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{option}: expected a folder that can be written to, found {folder}")
