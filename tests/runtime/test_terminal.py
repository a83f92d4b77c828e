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


def test_a_long_path_is_whole_on_a_narrow_terminal(capsys, monkeypatch):
    """Runs of one name but for its end looked alike."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    path = "runs/" + "x" * 70 + "/second-attempt"
    table = Table("run", "stage", "loss", title=path)
    table.add_row(path, "64k", "2.5")
    print_table(table)
    title, *rows = capsys.readouterr().out.splitlines()
    assert title == f"  {path}"
    assert "".join(row[:66].strip() for row in rows).endswith(path), rows
