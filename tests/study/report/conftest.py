from collections.abc import Iterator

import pytest

from tests.study.report.browser import Browser, BrowserGone, chromium, find


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = find()
    if path is None:
        pytest.skip("no Chromium here: the page isn't drawn (.ci/run installs it)")
    try:
        with chromium(path, tmp_path_factory.mktemp("profile")) as running:
            yield running
    except (OSError, BrowserGone) as error:
        pytest.skip(f"{path} doesn't run: the page isn't drawn ({error})")
