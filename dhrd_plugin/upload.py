"""Where an export goes besides its folder: object storage, and the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from composer.utils import RemoteUploader, parse_uri

from dhrd_plugin.data.remote import one_line
from dhrd_plugin.errors import UserError

CONFIG = 'config.json'  # uploaded last: without it a folder does not load


class RemoteTarget:
    """A folder in object storage, written by Composer's ``RemoteUploader``, which tries again where the store fails.

    Args:
        remote: an address such as ``s3://bucket/rte/slim``; see ``DropReasoningHead`` for placeholders.

    Raises:
        UserError: no address of an object store.
    """

    def __init__(self, remote: str):
        if not parse_uri(remote)[0]:
            raise UserError(
                f'drop_reasoning_head.remote: found {remote!r}; expected an address such as s3://bucket/rte/slim'
            )
        self.remote = remote
        self._uploader: RemoteUploader | None = None

    def check(self) -> None:
        """Refuse a store that cannot be written, by writing to it.

        Raises:
            UserError: naming the address.
        """
        try:
            # One process: an export is one large file and a few small ones.
            self._uploader = RemoteUploader(self.remote, num_concurrent_uploads=1)
            self._uploader.init()
        except Exception as error:  # of many kinds, one for each provider
            raise self._refusal(error) from error

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """Upload every file of a folder, and wait until all are there.

        Args:
            folder: of plain files.
            name: fills the placeholders.

        Raises:
            UserError: naming the address.
        """
        if self._uploader is None:
            self.check()
        assert self._uploader is not None
        prefix = parse_uri(name(self.remote))[2].strip('/')
        files = sorted(path for path in folder.iterdir() if path.is_file())
        try:
            for last in (False, True):
                for path in files:
                    if (path.name == CONFIG) == last:
                        self._uploader.upload_file_async(f'{prefix}/{path.name}', path, overwrite=True)
                self._uploader.wait()
        except Exception as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Let the uploader's processes go."""
        if self._uploader is not None:
            self._uploader.wait_and_close()

    def _refusal(self, error: Exception) -> UserError:
        return UserError(f'drop_reasoning_head.remote: {self.remote}: cannot be written: {one_line(error)}')


class HubTarget:
    """A repository of the Hugging Face hub; the token is huggingface_hub's own affair.

    Args:
        repo_id: such as ``org/name``.
        private: whether it is private, where it is created.
    """

    def __init__(self, repo_id: str, private: bool = False):
        self.repo_id = repo_id
        self.private = private

    def check(self) -> None:
        """Create the repository if there is none, which needs the right to write to it.

        Raises:
            UserError: naming the repository.
        """
        from huggingface_hub import HfApi

        try:
            HfApi().create_repo(self.repo_id, private=self.private, exist_ok=True)
        except Exception as error:  # no token, no right, no network, no such organisation
            raise self._refusal(error) from error

    def upload(self, folder: Path, name: Callable[[str], str]) -> None:
        """One commit of every file of a folder.

        Raises:
            UserError: naming the repository.
        """
        from huggingface_hub import HfApi

        message = name('Slim classifier of {run_name} at batch {batch}')
        try:
            HfApi().upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message)
        except Exception as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Nothing is held."""

    def _refusal(self, error: Exception) -> UserError:
        return UserError(f'drop_reasoning_head.push_to_hub: {self.repo_id}: cannot be written: {one_line(error)}')
