"""Results are on disk after every row, and an interrupt keeps them."""
import json

from ls_vision.analysis.measure import describe_machine, write_as_measured


def markdown(rows):
    return '\n'.join(str(row['n']) for row in rows)


def test_interrupt_keeps_what_was_measured(tmp_path, capsys):
    path = tmp_path / 'results'

    def measured():
        yield dict(n=1)
        assert [row['n'] for row in json.loads((tmp_path / 'results.json').read_text())['rows']] == [0, 1]
        yield dict(n=2)
        raise KeyboardInterrupt

    write_as_measured(path, describe_machine('cpu', 'float32', 1), measured(), markdown, [dict(n=0)])
    assert [row['n'] for row in json.loads((tmp_path / 'results.json').read_text())['rows']] == [0, 1, 2]
    out = capsys.readouterr()
    assert out.out.rstrip().endswith('0\n1\n2') and out.err == 'Interrupted.\n'


def test_nothing_measured(tmp_path, capsys):
    write_as_measured(tmp_path / 'results', describe_machine('cpu', 'float32', 1), [], markdown)
    assert capsys.readouterr().out == 'Nothing was measured.\n'
    assert not list(tmp_path.iterdir())
