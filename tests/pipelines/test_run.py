import pytest

from captionlib.data.decoders import DecoderConfig
from captionlib.data.loading import LoadingConfig
from captionlib.errors import ConfigError
from pipelines.run import RunConfig, choose_runner


def test_workers_share_the_cores_among_their_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.run.available_cores", lambda: 8)
    assert RunConfig(workers=1).share(LoadingConfig()).decode.processes is None
    assert RunConfig(workers=4).share(LoadingConfig()).decode.processes == 2
    assert RunConfig(workers=20).share(LoadingConfig()).decode.processes == 1
    given = LoadingConfig(decode=DecoderConfig(processes=7))
    assert RunConfig(workers=4).share(given).decode.processes == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--runner=FlinkRunner",), "--workers 2 is for this machine; FlinkRunner takes an option of its own"),
        (("--no_such_option=1",), "--no_such_option=1 is no option of Beam's in-process runner"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_runner(RunConfig(workers=2, beam_options=options))


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"max_failure_ratio": 1.5}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"expected .*, got"):
        RunConfig(**wrong)  # type: ignore[arg-type]
