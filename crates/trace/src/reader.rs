//! The other end: reads a trace, from a socket or from a file.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, IntoBytes};

use crate::filter::{Choice, Format};
use viommu_socket::{self as socket, SocketError};
use viommu_wire::trace::{Header, MAGIC, Record, VERSION};

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// No socket can have this path.
    #[error(transparent)]
    Path(#[from] SocketError),
    /// The path does not exist.
    #[error("There is no trace socket {0}: start `viommu serve` or `viommu run` with --trace-socket, or name its path")]
    NoSocket(PathBuf),
    /// Something else than a socket is there.
    #[error("{0} is not a socket; name the trace socket of `viommu serve` or `viommu run`")]
    NotASocket(PathBuf),
    /// Nobody listens.
    #[error("Nobody serves the trace socket {0}: the process that made it is gone")]
    Nobody(PathBuf),
    /// The socket cannot be opened.
    #[error("Cannot connect to the trace socket {path}")]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server said so.
    #[error("The trace's server refused: {0}")]
    Refused(String),
    /// The server took us for a client that sends no line: it waits for one for a tenth of a second only.
    #[error("The trace's server began before it had read what was asked of it: this machine is too busy")]
    Late,
    /// The other end closed before it sent a header.
    #[error("The connection ended before the trace began")]
    NoHeader,
    /// The bytes are something else.
    #[error("This is no viommu trace: it starts with {0:02x?}")]
    NoTrace([u8; 8]),
    /// It comes from another version.
    #[error("The trace has format version {found} with records of {size} bytes; this viommu reads version {VERSION}")]
    Version {
        /// The version.
        found: u32,
        /// Bytes of a record.
        size: u32,
    },
    /// Reading failed.
    #[error("Cannot read the trace")]
    Read(#[from] io::Error),
}

/// How often to connect to a server that does not wait until it is told what is wanted.
const ATTEMPTS: usize = 5;

/// Reads a binary trace.
pub struct Reader<R> {
    input: BufReader<R>,
    header: Header,
}

impl Reader<UnixStream> {
    /// Connects to a trace socket. The choice's format is not asked: it is binary.
    pub fn connect(path: &Path, choice: &Choice) -> Result<Self, ReadError> {
        for _ in 1..ATTEMPTS {
            match Self::connect_once(path, choice) {
                Err(ReadError::Late) => {}
                result => return result,
            }
        }
        Self::connect_once(path, choice)
    }

    fn connect_once(path: &Path, choice: &Choice) -> Result<Self, ReadError> {
        socket::check_length(path)?;
        let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ReadError::NoSocket(path.to_path_buf()),
            // As connecting to any file fails.
            io::ErrorKind::ConnectionRefused if !is_socket(path) => ReadError::NotASocket(path.to_path_buf()),
            io::ErrorKind::ConnectionRefused => ReadError::Nobody(path.to_path_buf()),
            _ => ReadError::Connect { path: path.to_path_buf(), source },
        })?;
        let line = Choice { format: Format::Binary, ..choice.clone() }.line();
        match stream.write_all(line.as_bytes()) {
            // It turned us away before it read; what it sent says why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            result => result?,
        }
        Reader::new(stream)
    }
}

fn is_socket(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_socket())
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(input: R) -> Result<Self, ReadError> {
        let mut input = BufReader::with_capacity(64 << 10, input);
        let mut bytes = [0; size_of::<Header>()];
        let first = read_or_end(&mut input, &mut bytes[..1])?;
        if !first {
            return Err(ReadError::NoHeader);
        }
        if bytes[0] == b'{' {
            return Err(refusal(input));
        }
        if !read_or_end(&mut input, &mut bytes[1..])? {
            return Err(ReadError::NoHeader);
        }
        let header: Header = zerocopy::transmute!(bytes);
        if header.magic != MAGIC {
            return Err(ReadError::NoTrace(header.magic));
        }
        let (found, size) = (header.version.get(), header.record_size.get());
        if found != VERSION || size as usize != size_of::<Record>() {
            return Err(ReadError::Version { found, size });
        }
        Ok(Reader { input, header })
    }

    /// What the trace said of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The next record; `None` at the end. Waits for one.
    pub fn next_record(&mut self) -> Result<Option<Record>, ReadError> {
        if let Some((bytes, _)) = self.input.buffer().split_first_chunk::<{ size_of::<Record>() }>() {
            let record = Record::read_from_bytes(bytes).ok();
            self.input.consume(size_of::<Record>());
            return Ok(record);
        }
        let mut record = Record::default();
        Ok(read_or_end(&mut self.input, record.as_mut_bytes())?.then_some(record))
    }

    /// Whether the next record is here already.
    pub fn is_ready(&self) -> bool {
        self.input.buffer().len() >= size_of::<Record>()
    }
}

/// Fills `buffer`; `false` if the input ends before: a record that was cut off is as good as none.
fn read_or_end(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match input.read_exact(buffer) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The error that a server's line of JSON stands for; its first byte is read already.
fn refusal(input: impl Read) -> ReadError {
    let mut line = b"{".to_vec();
    if let Err(error) = BufReader::new(input.take(64 << 10)).read_until(b'\n', &mut line) {
        return error.into();
    }
    let value: serde_json::Value = serde_json::from_slice(&line).unwrap_or_default();
    match value["error"].as_str() {
        Some(message) => ReadError::Refused(message.into()),
        None if value["kind"] == "hello" => ReadError::Late,
        None => ReadError::Refused(String::from_utf8_lossy(&line).trim_end().into()),
    }
}
