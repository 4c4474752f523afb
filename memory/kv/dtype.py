"""The dtypes that keys and values may be held in. Imports nothing: settings are read before torch is."""

from __future__ import annotations

from typing import Literal

KVDtype = Literal["auto", "bf16", "fp32", "int8", "int4"]
Keep = bool | Literal["int8", "int4"]  # whether what is read goes to the disk, and as what; True: as it is
