import pytest

from pagedkv import CacheConfig, ConfigError, InvalidArgumentError


@pytest.mark.parametrize(
    ("field", "smallest", "largest"),
    [("num_blocks", 1, 2**28), ("block_size", 1, 2**16), ("num_host_blocks", 0, 2**28)],
)
def test_each_size_has_its_documented_cap(field: str, smallest: int, largest: int) -> None:
    sizes = {"num_blocks": 4}
    CacheConfig(**{**sizes, field: smallest})
    CacheConfig(**{**sizes, field: largest})
    for value in (smallest - 1, largest + 1):
        with pytest.raises(ConfigError, match=f"{field} must be in {smallest}..{largest}, found {value}"):
            CacheConfig(**{**sizes, field: value})


@pytest.mark.parametrize("field", ["num_blocks", "block_size", "num_host_blocks"])
@pytest.mark.parametrize("value", [True, 1.0, float("nan"), float("inf"), 2**70, "4", None])
def test_a_size_is_a_whole_number(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        CacheConfig(**{"num_blocks": 4, field: value})


@pytest.mark.parametrize("value", ["no", 0, None])
def test_prefix_caching_is_on_or_off(value: object) -> None:
    with pytest.raises(ConfigError, match="prefix_caching"):
        CacheConfig(4, prefix_caching=value)


@pytest.mark.parametrize("value", ["llama", None])
def test_an_identity_is_a_cache_identity(value: object) -> None:
    with pytest.raises(ConfigError, match="identity"):
        CacheConfig(4, identity=value)


def test_a_config_error_is_an_invalid_argument() -> None:
    assert issubclass(ConfigError, InvalidArgumentError)
