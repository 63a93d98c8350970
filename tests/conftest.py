"The last thing a test run says is what it did not do."
def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get('skipped', [])
    terminalreporter.section('skipped, and why')
    for r in skipped: terminalreporter.line(f'{r.nodeid}: {r.longrepr[2].removeprefix("Skipped: ")}')
    if not skipped: terminalreporter.line('nothing')
