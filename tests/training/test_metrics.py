"""Logs of a resumed run go on at its checkpoint."""
import json

import pytest
from tensorboard.backend.event_processing import event_accumulator

from ls_vision.runtime.errors import UserError
from ls_vision.training.metrics import MetricLog


def write(log, epochs, start=0):
    for epoch in range(start, epochs):
        for update in (2 * epoch + 1, 2 * epoch + 2):
            log.log_step(epoch, update, loss=1 / update)
        log.log_epoch(epoch, 2 * epoch + 2, train_loss=.1 * epoch, eval_top1=50.)


def files(folder):
    return [(folder / name).read_bytes() for name in ('summary.csv', 'metrics.jsonl')]


def test_resumed_logs_equal_unbroken_ones(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    write(MetricLog(tmp_path / 'a'), 4)
    write(MetricLog(tmp_path / 'b'), 3)
    with open(tmp_path / 'b' / 'metrics.jsonl', 'a') as file:
        file.write('{"epoch": 3, "upd')  # what a kill leaves
    log = MetricLog(tmp_path / 'b', epoch=1, num_updates=3)  # a checkpoint in the middle of epoch 1
    assert [row['epoch'] for row in log.rows] == ['0']
    assert json.loads(files(tmp_path / 'b')[1].splitlines()[-1])['update'] == 3
    log.log_step(1, 4, loss=1 / 4)
    log.log_epoch(1, 4, train_loss=.1, eval_top1=50.)
    write(log, 4, start=2)
    assert files(tmp_path / 'a') == files(tmp_path / 'b')


def test_new_run_starts_empty_files(tmp_path):
    write(MetricLog(tmp_path), 1)
    MetricLog(tmp_path)
    assert files(tmp_path) == [b'', b'']


def test_tensorboard_events(tmp_path):
    log = MetricLog(tmp_path, tensorboard=True)
    write(log, 2)
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars('eval_top1')] == [(2, 50.), (4, 50.)]


def test_logger_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'wandb', None)
    with pytest.raises(UserError, match='--log-wandb needs wandb: pip install wandb'):
        MetricLog(tmp_path, wandb={})
