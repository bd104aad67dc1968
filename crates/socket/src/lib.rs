//! A listening Unix socket, which replaces a stale one and is removed if it is still ours; and operations on
//! descriptors that its users need.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

/// How long a server waits after a connection that failed, before it accepts the next. Accepting itself may have
/// failed, for want of descriptors. The connection is then still pending, and without a pause the server would retry in
/// a tight loop.
pub const RETRY: Duration = Duration::from_millis(50);

/// How long to wait for other processes that are making the same socket.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// The most bytes of a Unix socket's path, without the NUL that ends it.
const PATH_MAX: usize = 107;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("Another process listens on {}; end it, or choose another path", .0.display())]
    InUse(PathBuf),
    /// A file that is no socket is there; it is left alone.
    #[error("{} exists and is not a socket; remove it, or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The path does not fit into a socket's address (`sun_path` in unix(7)).
    #[error(
        "The socket path {} has {} bytes, but a Unix socket's path has {PATH_MAX} at most; choose a shorter one, for \
         example relative to the working directory",
        .0.display(), .0.as_os_str().len()
    )]
    TooLong(PathBuf),
    /// The folder for it is not there.
    #[error("There is no folder {} for the socket {}; make it, or choose another path", .folder.display(), .path.display())]
    NoFolder {
        /// The socket's path.
        path: PathBuf,
        /// The missing folder.
        folder: PathBuf,
    },
    /// Another process has held the lock file for longer than this one waits.
    #[error(
        "Another process has locked {} for {LOCK_TIMEOUT:?}, though making the socket {} takes a moment only; end it, or \
         choose another path",
        .lock.display(), .path.display()
    )]
    Locked {
        /// The socket's path.
        path: PathBuf,
        /// The file that is locked.
        lock: PathBuf,
    },
    /// Something that is no regular file stands where the lock file has to be.
    #[error(
        "{} is not a regular file, but the lock file for the socket {} has to be there; remove it, or choose another path",
        .lock.display(), .path.display()
    )]
    NoLock {
        /// The socket's path.
        path: PathBuf,
        /// The path where no regular file is.
        lock: PathBuf,
    },
    /// The operating system refuses the lock file.
    #[error("Cannot lock {}, which is needed to make the socket {}", .lock.display(), .path.display())]
    Lock {
        /// The socket's path.
        path: PathBuf,
        /// The file.
        lock: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The operating system refuses.
    #[error("Cannot listen on {}", .path.display())]
    Listen {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A listening socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct Socket {
    entry: CreatedFile,
    listener: UnixListener,
}

/// The name of a file that this process made and holds open. The file is removed when this is dropped, unless another
/// process has put a file of its own there since.
#[derive(Debug)]
pub struct CreatedFile {
    path: PathBuf,
    /// Device and inode. No other file can have the same as long as this one is open.
    identity: (u64, u64),
}

impl CreatedFile {
    /// The file that was just made at `path`.
    pub fn new(path: PathBuf) -> io::Result<CreatedFile> {
        let identity = fs::symlink_metadata(&path).map(identity)?;
        Ok(CreatedFile { path, identity })
    }

    /// Removes the file now, if it is still there.
    pub fn remove(&self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(found) == self.identity) {
            // A failure does no harm: the next process to make a file there replaces this one.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for CreatedFile {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Socket {
    /// Listens on `path`. A socket there on which nobody listens any more is replaced; a live one is an error. If
    /// several processes do this at the same time, one gets the socket and the others get the error.
    pub fn bind(path: &Path) -> Result<Socket, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        check_length(path)?;
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty() && !folder.exists()) {
            return Err(SocketError::NoFolder { path: path.to_owned(), folder: folder.to_owned() });
        }
        let _lock = LockFile::acquire(path)?;
        make_room(path)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        let entry = CreatedFile::new(path.to_owned()).map_err(failed)?;
        Ok(Socket { entry, listener })
    }

    /// The listening end.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.entry.path
    }

    /// Removes its file, if it is still there, so that nobody else can connect.
    pub fn remove(&self) {
        self.entry.remove();
    }
}

/// Whether a socket can have this path at all.
pub fn check_length(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > PATH_MAX { Err(SocketError::TooLong(path.to_owned())) } else { Ok(()) }
}

fn identity(metadata: Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Removes a socket on which nobody listens any more. The caller must hold the lock file: another process may be
/// replacing the socket, or may have made one on which it does not listen yet.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen { path: path.to_owned(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match try_connect(path) {
        // A socket whose backlog is full is alive, though its owner may not accept anything.
        Ok(()) | Err(Errno::EAGAIN) => Err(SocketError::InUse(path.to_owned())),
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(failed),
        // The owner has ended meanwhile and removed the socket.
        Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(failed(error.into())),
    }
}

/// Connects and disconnects, without waiting for anybody.
fn try_connect(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let end = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(end.as_raw_fd(), &UnixAddr::new(path)?)
}

/// The right to make the socket at a path: a locked file beside it, removed when this is dropped. A file that a killed
/// process left is locked by nobody; the next process to make the socket removes it.
struct LockFile {
    path: PathBuf,
    _file: Flock<File>,
}

impl LockFile {
    /// Waits for the lock, for as long as other processes take to check a socket and make one.
    fn acquire(socket: &Path) -> Result<LockFile, SocketError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".viommu-lock");
        let path = PathBuf::from(path);
        let failed = |source| SocketError::Lock { path: socket.to_owned(), lock: path.clone(), source };
        let mut options = OpenOptions::new();
        // Nothing is ever written, least of all to where somebody's symbolic link leads. O_NONBLOCK: opening a FIFO
        // would otherwise wait for its other end.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let no_lock = || SocketError::NoLock { path: socket.to_owned(), lock: path.clone() };
            let file = options.open(&path).map_err(|error| match error.raw_os_error() {
                // A link; a FIFO that nobody reads, or a socket; a folder.
                Some(libc::ELOOP | libc::ENXIO | libc::EISDIR) => no_lock(),
                _ => failed(error),
            })?;
            if !file.metadata().map_err(failed)?.is_file() {
                return Err(no_lock());
            }
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    let locked = file.metadata().map(identity).map_err(failed)?;
                    // Its last owner may have removed this file; then it excludes nobody, as others make a new one.
                    if fs::symlink_metadata(&path).is_ok_and(|found| identity(found) == locked) {
                        return Ok(LockFile { path, _file: file });
                    }
                }
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(SocketError::Locked { path: socket.to_owned(), lock: path });
                }
                Err((_, error)) => return Err(failed(error.into())),
            }
        }
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // A failure does no harm: an unlocked file is in nobody's way. The file is still locked here.
        let _ = fs::remove_file(&self.path);
    }
}

/// Waits until `fd` is readable (true), or `shutdown` is (false).
pub fn wait_readable(fd: RawFd, shutdown: RawFd) -> io::Result<bool> {
    let mut fds = [fd, shutdown].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    loop {
        // SAFETY: the pointer and the count are those of an array that lives through the call.
        let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if ready >= 0 {
            return Ok(fds[1].revents == 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes reads and writes of `file` fail with [`io::ErrorKind::WouldBlock`] rather than wait. To be used on a
/// descriptor that a peer gave, since its user must not wait for that peer.
pub fn set_nonblocking(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::os::unix::net::UnixStream;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    #[test]
    fn a_live_socket_is_an_error_and_a_stale_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // As a killed process leaves it.
        drop(UnixListener::bind(&path).unwrap());
        let socket = Socket::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse(_))));
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "text").unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"text");
    }

    #[test]
    fn of_many_who_find_a_stale_socket_one_gets_it() {
        const MANY: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        for round in 0..500 {
            // Every other time there is nothing to replace.
            if round % 2 == 0 {
                drop(UnixListener::bind(&path).unwrap());
            }
            let start = Barrier::new(MANY);
            let bind = || {
                start.wait();
                Socket::bind(&path)
            };
            let (made, refused): (Vec<_>, Vec<_>) = thread::scope(|scope| {
                let threads: Vec<_> = (0..MANY).map(|_| scope.spawn(bind)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).partition(Result::is_ok)
            });
            assert_eq!(made.len(), 1, "round {round}");
            assert!(refused.iter().all(|result| matches!(result, Err(SocketError::InUse(_)))), "{refused:?}");
            assert_eq!(made[0].as_ref().unwrap().entry.identity, identity(fs::symlink_metadata(&path).unwrap()));
            drop(made);
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "nothing is left behind");
        }
    }

    #[test]
    fn one_at_a_time_has_the_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let taken = AtomicBool::new(false);
        let lock_often = || {
            for _ in 0..500 {
                // A thread that finds it locked tries again after a while, so on a busy machine one may be unlucky for
                // long.
                let lock = loop {
                    match LockFile::acquire(&path) {
                        Err(SocketError::Locked { .. }) => {}
                        lock => break lock.unwrap(),
                    }
                };
                assert!(!taken.swap(true, Ordering::SeqCst));
                thread::yield_now();
                taken.store(false, Ordering::SeqCst);
                drop(lock);
            }
        };
        thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(lock_often))));
    }

    #[test]
    fn the_lock_of_a_process_that_was_killed_is_no_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = folder.path().join("socket.viommu-lock");
        fs::write(&lock, "").unwrap();
        let socket = Socket::bind(&path).unwrap();
        assert!(!lock.exists());
        drop(socket);
        // A link is not followed, though its target would be made.
        std::os::unix::fs::symlink("elsewhere", &lock).unwrap();
        assert!(matches!(Socket::bind(&path), Err(SocketError::NoLock { .. })));
        assert!(!folder.path().join("elsewhere").exists());
    }

    #[test]
    fn a_lock_that_is_no_file_is_an_error_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = folder.path().join("socket.viommu-lock");
        let refused = || {
            assert!(matches!(Socket::bind(&path), Err(SocketError::NoLock { .. })));
            assert!(fs::symlink_metadata(&lock).is_ok() && !path.exists());
        };
        nix::unistd::mkfifo(&lock, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // First one that nobody has open, then one that has a reader.
        refused();
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&lock).unwrap();
        refused();
        drop(reader);
        fs::remove_file(&lock).unwrap();
        fs::create_dir(&lock).unwrap();
        refused();
    }

    #[test]
    fn a_socket_whose_backlog_is_full_is_alive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        assert_eq!(try_connect(&path), Err(Errno::EAGAIN));
        assert!(matches!(Socket::bind(&path), Err(SocketError::InUse(_))));
    }

    #[test]
    fn nobody_waits_for_ever_for_the_lock_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s.sock");
        let _lock = LockFile::acquire(&path).unwrap();
        let begun = Instant::now();
        assert!(matches!(Socket::bind(&path), Err(SocketError::Locked { .. })));
        assert!(begun.elapsed() >= LOCK_TIMEOUT);
    }

    #[test]
    fn a_path_that_cannot_be_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let longest = folder.path().join("s".repeat(PATH_MAX - folder.path().as_os_str().len() - 1));
        drop(Socket::bind(&longest).unwrap());
        let long = folder.path().join("s".repeat(100));
        let error = Socket::bind(&long).unwrap_err().to_string();
        let found = format!("has {} bytes", long.as_os_str().len());
        assert!(error.contains(&found) && error.contains("has 107 at most"), "{error}");
        let error = Socket::bind(&folder.path().join("sub/s")).unwrap_err().to_string();
        assert!(error.contains("There is no folder") && error.contains("/sub "), "{error}");
    }

    #[test]
    fn somebody_elses_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn the_end_goes_before_a_connection() {
        let folder = tempfile::tempdir().unwrap();
        let socket = Socket::bind(&folder.path().join("socket")).unwrap();
        let (end, shutdown) = UnixStream::pair().unwrap();
        let _connection = UnixStream::connect(socket.path()).unwrap();
        let wait = || wait_readable(socket.listener().as_raw_fd(), shutdown.as_raw_fd()).unwrap();
        assert!(wait());
        drop(end);
        assert!(!wait());
    }
}
