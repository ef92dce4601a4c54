"""Where a search keeps its study: a journal file, or a database. Whether it can be reached is known before anything is written.

A journal holds one line of JSON for each event. Processes on all machines that have the same folder may append to it.
``optuna-dashboard FILE`` shows it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from omegaconf import DictConfig, OmegaConf

from hyperopt.app.config import ConfigError
from hyperopt.app.run_directory import RunDirectory
from hyperopt.app.search.settings import KEY, Settings
from hyperopt.core.text import one_line
from hyperopt.data.reading import read_json_lines

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


def opened(settings: Settings, sweep: Path) -> BaseStorage:
    """Open the storage, or refuse one that cannot be reached; a journal or the tables of a database are created if missing."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if _is_url(settings.storage):
            return optuna.storages.RDBStorage(str(settings.storage))
        path = str(_journal(settings, sweep))
        _mend(path)
        # Optuna's other lock is a link, which a sweep's directory may not hold; both use the same name and exclude each other.
        return JournalStorage(JournalFileBackend(path, JournalFileOpenLock(path)))
    except Exception as error:  # of the file, of a line in it, of the database or of its driver
        raise _unreachable(settings, sweep, error) from error


def existing(settings: Settings, sweep: Path) -> BaseStorage | None:
    """Return the storage if it exists already, else None if it can be created, or refuse it; nothing is written."""
    try:
        if _is_url(settings.storage):
            found = _tables(str(settings.storage))
        elif found := _file(path := _journal(settings, sweep), sweep):
            if not all(isinstance(each.get("op_code"), int) for each in read_json_lines(path)):
                raise ValueError("a line is not an event")
    except ConfigError:
        raise
    except Exception as error:
        raise _unreachable(settings, sweep, error) from error
    return opened(settings, sweep) if found else None


def refuse_password(sweeper: DictConfig) -> None:
    """Refuse a storage whose password is written in the config, and would be in ``multirun.yaml`` and the files of each job.

    Hydra writes an interpolation as it stands, so that a password from the environment is in no file.
    """
    given: Any = OmegaConf.to_container(sweeper, resolve=False)
    url = given.get("storage")
    if not _is_url(url):
        return
    parts = urlsplit(url)
    fields = parse_qs(parts.query)
    if parts.password is not None or {"password", "passwd"} & {*fields}:
        shown = f"{parts.scheme}://{parts.username or ''}:***@{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ConfigError(
            f"{KEY}.storage={shown}: a password does not belong in the config, which is written to files; set a variable of the "
            f"environment to the whole URL, and '{KEY}.storage=${{oc.env:NAME_OF_THE_VARIABLE}}'"
        )


def _mend(path: str) -> None:
    """Remove the part of a last line that a process wrote before its machine stopped; what follows would make it unreadable."""
    from optuna.storages.journal import JournalFileOpenLock

    def tail() -> int:
        with open(path, "rb") as file:
            return len(file.read().rpartition(b"\n")[2])

    if not os.path.exists(path) or not tail():
        return
    lock = JournalFileOpenLock(path)
    lock.acquire()
    try:
        os.truncate(path, os.path.getsize(path) - tail())
    finally:
        lock.release()


def _is_url(storage: str | None) -> bool:
    return storage is not None and "://" in storage


def _journal(settings: Settings, sweep: Path) -> Path:
    """Return the path of the journal."""
    return RunDirectory(sweep).journal if settings.storage is None else Path(settings.storage)


def _file(path: Path, sweep: Path) -> bool:
    """Return whether the journal exists; refuse one that can neither be written to nor created."""
    if path.exists():
        if not path.is_file():
            raise OSError("it is not a file")
        if not os.access(path, os.R_OK | os.W_OK):
            raise OSError("it may not be read and written")
        return True
    folder = path.parent
    if folder != sweep and not folder.is_dir():
        raise OSError(f"there is no directory {folder}")
    if folder != sweep and not os.access(folder, os.W_OK):
        raise OSError(f"the directory {folder} is not writable")
    return False


def _tables(url: str) -> bool:
    """Connect to a database, and return whether it has Optuna's tables."""
    import sqlalchemy

    parsed = sqlalchemy.engine.make_url(url)
    if parsed.get_backend_name() == "sqlite":  # connecting would create the file
        place = Path(parsed.database or "")
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigError(f"{KEY}.storage={url} is gone when its process ends; name a file, or leave it null for a journal")
        if not _file(place, Path()):
            return False
    engine = sqlalchemy.create_engine(parsed)
    try:
        return sqlalchemy.inspect(engine).has_table("studies")
    finally:
        engine.dispose()


def _unreachable(settings: Settings, sweep: Path, error: Exception) -> ConfigError:
    """Return the refusal of a storage, without the password in its URL."""
    name = str(_journal(settings, sweep))
    if _is_url(settings.storage):
        import sqlalchemy

        try:
            name = sqlalchemy.engine.make_url(str(settings.storage)).render_as_string(hide_password=True)
        except Exception:
            name = str(settings.storage).partition("://")[0] + "://..."
    reason = getattr(error, "orig", None) or error
    if isinstance(error, ValueError | KeyError):  # a line that is not an event of a journal
        reason = "it is not a journal of Optuna"
    return ConfigError(f"{KEY}.storage={name} cannot be reached: {one_line(reason, 200)}; change {KEY}.storage")
