"""Training that listops.py and characters.py share: a run leaves a file, and an interrupted one goes on."""
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ls_vision.runtime.files import write_text

CHECKPOINT_STEPS = 100


def train(
        run: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        loss_of: Callable[[int], Tensor],
        evaluate: Callable[[], dict[str, Any]],
        steps: int,
) -> dict[str, Any]:
    """Trains a model and writes its results to `run`.json; a finished run is read, an interrupted one continued.

    Args:
        run: Path without suffix.
        model, optimizer, scheduler: What is trained, and how; the scheduler steps after each update.
        loss_of: The loss of a step by its number, which alone decides its data.
        evaluate: Results of the trained model.
        steps: Number of updates.

    Returns:
        The results, with `seconds` of training and `losses`, means of every `CHECKPOINT_STEPS` updates.
    """
    done, checkpoint = run.with_suffix('.json'), run.with_suffix('.pt')
    if done.exists():
        return json.loads(done.read_text())
    run.parent.mkdir(parents=True, exist_ok=True)
    first, seconds, losses = 0, 0., []
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(kept['model'])
        optimizer.load_state_dict(kept['optimizer'])
        scheduler.load_state_dict(kept['scheduler'])
        first, seconds, losses = kept['step'], kept['seconds'], kept['losses']
    model.train()
    start, recent = time.perf_counter(), []
    for step in tqdm(range(first, steps), desc=run.name, initial=first, total=steps, disable=None):
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        recent.append(loss.item())
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            losses, recent = [*losses, sum(recent) / len(recent)], []
            now = time.perf_counter()
            seconds, start = seconds + now - start, now
            part = checkpoint.with_suffix('.part')
            torch.save(dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(), scheduler=scheduler.state_dict(),
                step=step + 1, seconds=seconds, losses=losses), part)
            os.replace(part, checkpoint)
    model.eval()
    results = dict(evaluate(), steps=steps, seconds=seconds, losses=losses)
    write_text(done, json.dumps(results, indent=1) + '\n')
    return results
