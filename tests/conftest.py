import functools
import gc
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # before torch, see there
import torch

torch.set_num_threads(1)
logging.disable(logging.DEBUG)  # torch tells of each tensor of a checkpoint twice, pytest would keep it all
data.toy_problems = functools.cache(data.toy_problems)  # dozens of runs begin with the same 20,000


def pytest_collection_finish():
    gc.freeze()  # each full collection would look at all that is imported, and a run makes one itself


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")  # checkpoints of one process
