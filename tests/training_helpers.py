"""Helpers of several tests: image files and delayed signals."""
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('dark', 'light')


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    """`count` noisy 32 x 32 PNG files in a folder per class; the classes differ in brightness."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, size=(32, 32, 3)) + 110 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f'{i}.png')


def signal_when(path: Path, num_lines: int, number: signal.Signals) -> None:
    """Send this process a signal as soon as a log has `num_lines` lines."""
    def wait() -> None:
        while not path.exists() or path.read_text().count('\n') < num_lines:
            time.sleep(.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()
