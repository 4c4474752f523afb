"""Where agentctx keeps things. `AGENTCTX_HOME` puts all four folders under one root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

KV_BYTES = 4 << 30  # what the folder `kv` may take if nobody says otherwise


@dataclass(frozen=True, slots=True)
class Paths:
    """The four folders. Nothing is created until something is written."""

    cache: Path  # can be rebuilt: models, indexes, the leaf cache
    data: Path  # cannot be rebuilt: texts, archives
    state: Path  # runs, traces, logs
    config: Path

    @classmethod
    def default(cls) -> Paths:
        """The folders of this user on this system."""
        if home := os.environ.get("AGENTCTX_HOME"):
            root = Path(home).expanduser().absolute()
            return cls(root / "cache", root / "data", root / "state", root / "config")
        dirs = platformdirs.PlatformDirs("agentctx", appauthor=False)
        return cls(dirs.user_cache_path, dirs.user_data_path, dirs.user_state_path, dirs.user_config_path)

    @property
    def models(self) -> Path:
        return self.cache / "models"

    @property
    def kv(self) -> Path:
        return self.cache / "kv" / "v1"

    @property
    def index(self) -> Path:
        return self.cache / "index" / "v1"

    @property
    def embeddings(self) -> Path:
        return self.cache / "embeddings" / "v1"

    @property
    def calls(self) -> Path:
        return self.cache / "calls.db"

    @property
    def blobs(self) -> Path:
        return self.data / "blobs"

    @property
    def calibration(self) -> Path:
        return self.data / "calibration"

    @property
    def secret(self) -> Path:
        return self.data / "secret"

    @property
    def runs(self) -> Path:
        return self.state / "runs"

    @property
    def logs(self) -> Path:
        return self.state / "log"
