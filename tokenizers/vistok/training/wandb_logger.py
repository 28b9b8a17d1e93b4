"""Weights & Biases: a logger that follows its own environment variables and never ends a run.

Lightning's logger sets WANDB_MODE for the whole process, so that the runs of a sweep inherit it,
and lets an unreachable server end the training.
"""

from __future__ import annotations

import configparser
import netrc
import os
import secrets
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vistok.core.console import say
from vistok.core.run_folders import leads

#: Seconds to wait for a server to accept a connection, and then to begin a run.
PATIENCE, INIT = 3.0, 30


def build_wandb(config: dict[str, Any], folder: Path) -> Logger | None:
    """Return the logger of a run, or None where WANDB_MODE disables it."""
    mode = chosen_mode(config["logger"].get("offline"))
    if mode == "disabled":
        _tell("disabled by its environment variables; metrics.jsonl has the numbers")
        return None
    return WandbRun(config, folder, mode)


def chosen_mode(offline: bool | None) -> str:
    """Return online, offline or disabled, by the environment, the config, and what is reachable."""
    asked = os.environ.get("WANDB_MODE", "").lower()
    if asked == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    if asked in ("offline", "dryrun") or (offline and not asked):
        return "offline"
    address = server()
    if not is_logged_in(address):
        _tell("not logged in, so this run is stored offline; upload it with wandb sync")
        return "offline"
    if not is_reachable(address):
        _tell(f"{address} does not answer, so this run is stored offline; see wandb sync")
        return "offline"
    return "online"


def server() -> str:
    """Return the address of the server: WANDB_BASE_URL, that of its settings, or the public one."""
    if address := os.environ.get("WANDB_BASE_URL"):
        return address
    folder = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb")
    for path in (Path("wandb") / "settings", Path(folder) / "settings"):
        parser = configparser.ConfigParser()
        try:
            parser.read(path)
            if address := parser.get("default", "base_url", fallback=""):
                return address
        except (OSError, configparser.Error, UnicodeDecodeError):
            continue
    return "https://api.wandb.ai"


def is_logged_in(address: str) -> bool:
    """Return whether there is a key for a server, in the environment or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(address).hostname or address
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return False


def is_reachable(address: str) -> bool:
    """Return whether something accepts connections at an address, or at the proxy to it."""
    parts = urlsplit(address)
    names = (
        ("HTTPS_PROXY", "https_proxy") if parts.scheme == "https" else ("HTTP_PROXY", "http_proxy")
    )
    proxy = next((os.environ[name] for name in names if os.environ.get(name)), "")
    if proxy:
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), timeout=PATIENCE):
            return True
    except (OSError, ValueError):
        return False


class WandbRun(Logger):
    """A run at Weights & Biases, one for each run folder, also when it is resumed.

    Args:
        config: of the run.
        folder: of the run, which keeps the id in `wandb/run_id`.
        mode: online or offline.
    """

    def __init__(self, config: dict[str, Any], folder: Path, mode: str) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.mode = mode
        self._run: Any = None
        self._failed = False
        self._known = ""  # id

    @property
    def name(self) -> str:
        """The project."""
        return self.config["logger"].get("project") or "vistok"

    @property
    def version(self) -> None:
        """None: the folder is enough."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `wandb.init`; what environment variables say is left to them."""
        in_sweep = self.folder.name.isdigit() and self.folder.parent.name
        name = f"{self.folder.parent.name}_{self.folder.name}" if in_sweep else self.folder.name
        given = {
            "WANDB_PROJECT": ("project", self.config["logger"].get("project") or "vistok"),
            "WANDB_NAME": ("name", name),
            "WANDB_RUN_GROUP": ("group", self.folder.parent.name if in_sweep else None),
            "WANDB_RUN_ID": ("id", self._id()),
            "WANDB_DIR": ("dir", str(self.folder)),
        }
        options = {
            key: value
            for variable, (key, value) in given.items()
            if value is not None and not os.environ.get(variable)
        }
        if self.config["logger"].get("project"):
            options["project"] = self.config["logger"]["project"]
        return {**options, "config": self.config, "resume": "allow", "reinit": "finish_previous"}

    def _id(self) -> str:
        self._known = self._known or self._stored_id()
        return self._known

    def _stored_id(self) -> str:
        path = self.folder / "wandb" / "run_id"
        replaced = self.config.get("overwrite")
        try:
            found = path.read_text().strip()
            if found.isalnum() and len(found) <= 64 and not replaced:
                return found
        except (OSError, UnicodeDecodeError):
            pass
        before = (
            not replaced
            and not path.exists()
            and (self.folder / "wandb").is_dir()
            and not self.folder.name.isdigit()
        )
        made = self.folder.name if before else secrets.token_hex(4)  # as older versions named it
        path.parent.mkdir(parents=True, exist_ok=True)
        if not before:
            path.write_text(made + "\n")
        return made

    @property
    def experiment(self) -> Any:
        """The run of the library, on the first rank; None where it cannot be had."""
        if self._run is None and not self._failed and leads():
            self._run = self._begin()
        return self._run

    def _begin(self) -> Any:
        os.environ.setdefault("WANDB_SILENT", "true")
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                import wandb

                settings = wandb.Settings(init_timeout=INIT)
                return wandb.init(**self.options, mode=mode, settings=settings)  # type: ignore
            except Exception as error:  # whatever it is, the run goes on
                said = " ".join(str(error).split())[:160]
                then = "goes on offline" if mode == "online" else "goes on without it"
                _tell(f"{type(error).__name__}: {said}; training {then}")
        self._failed = True
        return None

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run begins with the config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log a row."""
        run = self.experiment
        if run is None:
            return
        try:
            run.log({**metrics, "trainer/global_step": step or 0})
        except Exception as error:
            self._failed, self._run = True, None
            _tell(f"{type(error).__name__}: {str(error)[:160]}; training goes on without it")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run there."""
        if self._run is not None:
            try:
                self._run.finish(exit_code=0 if status == "success" else 1)
            except Exception as error:
                _tell(f"{type(error).__name__}: {str(error)[:160]}")
            self._run = None


def _tell(text: str) -> None:
    if leads():
        say(f"wandb: {text}")
