def find_adapter_config_file(
    model_id: str,
    cache_dir: str | None = ...,
    *,
    token: bool | str | None = ...,
    revision: str | None = ...,
    local_files_only: bool = ...,
    subfolder: str = ...,
) -> str | None: ...
