class YAMLError(Exception): ...

class MarkedYAMLError(YAMLError):
    def __init__(
        self,
        context: str | None = ...,
        context_mark: object = ...,
        problem: str | None = ...,
        problem_mark: object = ...,
    ) -> None: ...
