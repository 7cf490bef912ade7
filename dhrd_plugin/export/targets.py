"""Where an export goes besides its folder: object storage, and the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dhrd_plugin.errors import UserError, user_errors
from dhrd_plugin.streams.remote import check_address, is_remote

CONFIG = 'config.json'  # uploaded last: without it a folder does not load


class RemoteTarget:
    """A folder in object storage, written by Composer's ``RemoteUploader``, which tries again where the store fails.

    Args:
        remote: an address such as ``s3://bucket/rte/slim``; see ``DropReasoningHead`` for placeholders.
    """

    def __init__(self, remote: str):
        if not is_remote(remote):
            raise UserError(
                f'drop_reasoning_head.remote: found {remote!r}; expected an address such as s3://bucket/rte/slim'
            )
        check_address(remote, 'drop_reasoning_head.remote')
        self.remote = remote
        self._where = f'drop_reasoning_head.remote: {remote}: cannot be written'
        self._uploader: Any = None

    def check(self) -> None:
        """Check that the store can be written, by writing to it."""
        from composer.utils import RemoteUploader

        with user_errors(self._where, kind=True):
            # One process: an export is one large file and a few small ones.
            self._uploader = RemoteUploader(self.remote, num_concurrent_uploads=1)
            self._uploader.init()

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """Upload every file of a folder, and wait until all are there; ``name`` fills the placeholders."""
        from composer.utils import parse_uri

        if self._uploader is None:
            self.check()
        assert self._uploader is not None
        prefix = parse_uri(name(self.remote))[2].strip('/')
        files = sorted(path for path in folder.iterdir() if path.is_file())
        with user_errors(self._where, kind=True):
            for last in (False, True):
                for path in files:
                    if (path.name == CONFIG) == last:
                        self._uploader.upload_file_async(f'{prefix}/{path.name}', path, overwrite=True)
                self._uploader.wait()

    def close(self) -> None:
        """End the uploader's processes."""
        if self._uploader is not None:
            self._uploader.wait_and_close()


class HubTarget:
    """A repository of the Hugging Face hub; huggingface_hub finds the token.

    Args:
        repo_id: such as ``org/name``.
        private: whether it is private, where it is created.
    """

    def __init__(self, repo_id: str, private: bool = False):
        self.repo_id = repo_id
        self.private = private
        self._where = f'drop_reasoning_head.push_to_hub: {repo_id}: cannot be written'

    def check(self) -> None:
        """Create the repository if there is none, which needs the right to write to it."""
        from huggingface_hub import HfApi

        with user_errors(self._where, kind=True):  # no token, no right, no network, no such organisation
            HfApi().create_repo(self.repo_id, private=self.private, exist_ok=True)

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """Commit every file of a folder, in one commit; ``name`` fills the placeholders of its message."""
        from huggingface_hub import HfApi

        message = name('Slim classifier of {run_name} at batch {batch}')
        with user_errors(self._where, kind=True):
            HfApi().upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message)

    def close(self) -> None:
        """Do nothing; nothing is held."""
