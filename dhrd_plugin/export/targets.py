"""Where an export goes besides its folder: object storage, and the Hugging Face hub."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dhrd_plugin.errors import UserError, one_line, user_errors
from dhrd_plugin.export.place import left_over
from dhrd_plugin.streams.remote import check_address, is_remote

CONFIG = 'config.json'  # uploaded last: without it a folder does not load
log = logging.getLogger(__name__)


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
        """Upload every file of a folder, and wait until all are there; what an earlier export left there goes.

        Args:
            folder: of the export.
            name: fills the placeholders.
        """
        from composer.utils import parse_uri

        prefix = parse_uri(name(self.remote))[2].strip('/')
        files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name == CONFIG)
        with user_errors(self._where, kind=True):
            for path in files:
                if path.name == CONFIG:
                    self._uploader.wait()
                    self._remove_left_over(prefix, folder)
                self._uploader.upload_file_async(f'{prefix}/{path.name}', path, overwrite=True)
            self._uploader.wait()

    def _remove_left_over(self, prefix: str, folder: Path) -> None:
        """Remove what an earlier export left beside this one; where that cannot be, say what stays."""
        from composer.utils import S3ObjectStore

        store = self._uploader.remote_backend
        store = getattr(store, 's3_object_store', None) or store  # that of gs:// with a key
        left: Any = 'what an earlier export left there'
        try:
            names = [key.removeprefix(f'{prefix}/') for key in store.list_objects(f'{prefix}/')]
            left = left_over(names, folder)
            if left and not isinstance(store, S3ObjectStore):
                raise NotImplementedError(f'Composer has no way to remove files of {type(store).__name__}')
            for file in left:  # stores of Composer's remove nothing themselves
                store.client.delete_object(Bucket=store.bucket, Key=f'{prefix}/{file}')
        except Exception as error:  # a key that may only write, another store
            log.warning('%s: %s: stays beside the export: %s', self.remote, left, one_line(error, kind=True))

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
        """Commit every file of a folder, in one commit, which removes what an earlier export left there.

        Args:
            folder: of the export.
            name: fills the placeholders of the commit's message.
        """
        from huggingface_hub import HfApi

        message = name('Slim classifier of {run_name} at batch {batch}')
        with user_errors(self._where, kind=True):
            left = left_over(HfApi().list_repo_files(self.repo_id), folder)
            HfApi().upload_folder(
                repo_id=self.repo_id, folder_path=folder, commit_message=message, delete_patterns=left or None
            )

    def close(self) -> None:
        """Do nothing; nothing is held."""
