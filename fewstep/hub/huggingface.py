"""Hugging Face model directories in and out: config.json, sharded safetensors, tokenizer files.

Nothing in them is run: no pickle, no code named by `auto_map`. This file knows no family: they are data.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.core.recipe import parse
from fewstep.hub.families import FAMILIES, Family, explicit, family_of, read_config, write_config
from fewstep.hub.names import HEADS, computed, family_names
from fewstep.models.decoder import DecoderConfig
from fewstep.models.model import Model, assemble, dtype_of, read_tokenizer, settings_of
from fewstep.models.weights import INDEX, distinct, read_json, shards, write
from fewstep.text.chat import ChatTemplate
