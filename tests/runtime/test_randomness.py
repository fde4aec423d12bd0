"""States of random generators in a checkpoint."""
import random

import numpy as np
import torch

from ls_vision.runtime.randomness import capture, restore


def test_states_survive_a_checkpoint_file(tmp_path):
    np.random.randn()  # leaves a second normal number in the generator
    torch.save(capture(), tmp_path / 'states.pth')
    expected = random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()
    restore(torch.load(tmp_path / 'states.pth', weights_only=True))
    assert (random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()) == expected
