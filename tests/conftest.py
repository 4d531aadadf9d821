"""Settings for all tests: transformers stays offline, torch stays on the two cores there are."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(2)
