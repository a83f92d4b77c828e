"""Tables for a screen, a log or a pipe."""

from rich.table import Table

from megatron_prolong.runtime.terminal import print_table


def test_a_path_is_printed_as_it_is(capsys):
    """rich reads [a] as a style and leaves it out, fails on [/b], and draws :smile:."""
    path = "runs/lr[a]/x[/b]/:smile:"
    table = Table("run", title=path)
    table.add_row(path)
    print_table(table)
    assert capsys.readouterr().out.count(path) == 2
