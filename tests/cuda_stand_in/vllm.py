"""The ``vllm`` command on the stand-in: ``python -m tests.cuda_stand_in.vllm serve ...``.

Processes that vLLM spawns import this module first, so they run on the stand-in too.
"""

from tests.cuda_stand_in import cuda

cuda.install()

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    main()
