//! Reads a binary trace from a socket or from a file.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use zerocopy::IntoBytes;

use crate::guest::GUEST_VERSION;
use crate::record::{Header, MAGIC, Record, Record1, VERSION};
use crate::subscription::{Format, Subscription};
use viommu_socket::{self as socket, SocketError};

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
    /// No process listens on the socket.
    #[error("Nobody serves the trace socket {0}: the process that made it is gone")]
    Nobody(PathBuf),
    /// The socket cannot be opened.
    #[error("Cannot connect to the trace socket {path}")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server refused the client.
    #[error("The trace's server refused: {0}")]
    Refused(String),
    /// The server waits a tenth of a second for a line, and then takes the client for one that sends none.
    #[error("The trace's server began to send before it had read the subscription: this machine is too busy")]
    Late,
    /// The server closed the connection before it sent a header.
    #[error("The connection ended before the trace began")]
    NoHeader,
    /// The input is something else. Its first bytes are given.
    #[error("This is not a viommu trace: it starts with {0:02x?}")]
    NoTrace([u8; 8]),
    /// Another version wrote the records.
    #[error(
        "The trace has format version {found} with records of {size} bytes; this viommu reads versions 1 and {VERSION}"
    )]
    Version {
        /// The version.
        found: u32,
        /// Bytes of a record.
        size: u32,
    },
    /// Another version wrote the lines.
    #[error("The trace has format version {0}; this viommu reads versions 1 and {VERSION}")]
    LineVersion(u64),
    /// Another version wrote the guest's lines.
    #[error("The guest's trace has format version {0}; this viommu reads version {GUEST_VERSION}")]
    GuestVersion(u64),
    /// A file ends within its header.
    #[error("The trace is cut off in its header: it has {0} of 64 bytes")]
    CutHeader(usize),
    /// Reading failed.
    #[error("Cannot read the trace")]
    Read(#[from] io::Error),
}

/// How often to connect before [`ReadError::Late`] is returned.
const ATTEMPTS: usize = 5;

/// Reads a binary trace.
pub struct Reader<R> {
    input: BufReader<R>,
    header: Header,
}

impl Reader<UnixStream> {
    /// Connects to a trace socket and subscribes. The format is binary, whatever the subscription's is.
    ///
    /// # Errors
    /// The socket cannot be opened, or the server refuses or does not speak this version.
    pub fn connect(path: &Path, subscription: &Subscription) -> Result<Self, ReadError> {
        for _ in 1..ATTEMPTS {
            match Self::connect_once(path, subscription) {
                Err(ReadError::Late) => {}
                result => return result,
            }
        }
        Self::connect_once(path, subscription)
    }

    fn connect_once(path: &Path, subscription: &Subscription) -> Result<Self, ReadError> {
        socket::check_length(path)?;
        let mut stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ReadError::NoSocket(path.to_path_buf()),
            // Connecting to any other file fails like this.
            io::ErrorKind::ConnectionRefused if !is_socket(path) => ReadError::NotASocket(path.to_path_buf()),
            io::ErrorKind::ConnectionRefused => ReadError::Nobody(path.to_path_buf()),
            _ => ReadError::Connect { path: path.to_path_buf(), source },
        })?;
        let line = Subscription { format: Format::Binary, ..subscription.clone() }.line();
        match stream.write_all(line.as_bytes()) {
            // The server refused before it read the line. Its answer says why.
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
    /// Reads a stream's header.
    ///
    /// # Errors
    /// The stream has no header, or one that this version cannot read.
    pub fn new(input: R) -> Result<Self, ReadError> {
        let mut input = BufReader::with_capacity(64 << 10, input);
        match input.fill_buf() {
            Ok([]) => return Err(ReadError::NoHeader),
            Ok([b'{', ..]) => return Err(refusal(input)),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ReadError::NoHeader),
            result => drop(result?),
        }
        Self::of_file(input).map_err(|error| match error {
            ReadError::CutHeader(_) => ReadError::NoHeader,
            other => other,
        })
    }

    /// Reads the header of a file.
    pub(crate) fn of_file(mut input: BufReader<R>) -> Result<Self, ReadError> {
        let mut bytes = [0; size_of::<Header>()];
        let len = fill(&mut input, &mut bytes)?;
        let header: Header = zerocopy::transmute!(bytes);
        if len >= MAGIC.len() && header.magic != MAGIC {
            return Err(ReadError::NoTrace(header.magic));
        }
        if len < bytes.len() {
            return Err(ReadError::CutHeader(len));
        }
        let (found, size) = (header.version.get(), header.record_size.get());
        let right = match found {
            1 => size_of::<Record1>(),
            VERSION => size_of::<Record>(),
            _ => 0,
        };
        if right == 0 || size as usize != right {
            return Err(ReadError::Version { found, size });
        }
        Ok(Reader { input, header })
    }

    /// A reader whose header was already read.
    pub(crate) fn from_parts(input: BufReader<R>, header: Header) -> Self {
        Reader { input, header }
    }

    /// The input and the header.
    pub(crate) fn into_parts(self) -> (BufReader<R>, Header) {
        (self.input, self.header)
    }

    /// The input.
    pub(crate) fn input(&mut self) -> &mut BufReader<R> {
        &mut self.input
    }

    /// The header of the trace.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of a record.
    pub(crate) fn record_size(&self) -> usize {
        self.header.record_size.get() as usize
    }

    /// The next record, converted to this version; `None` at the end, also if the last record is cut off. Waits until
    /// there is one.
    ///
    /// # Errors
    /// Reading fails.
    pub fn next_record(&mut self) -> Result<Option<Record>, ReadError> {
        Ok(self.next_or_cut()?.unwrap_or(None))
    }

    /// The next record; `Err` with the number of its bytes if it is cut off.
    pub(crate) fn next_or_cut(&mut self) -> io::Result<Result<Option<Record>, usize>> {
        if self.header.version == VERSION {
            let mut record = Record::default();
            return Ok(match fill(&mut self.input, record.as_mut_bytes())? {
                0 => Ok(None),
                len if len < size_of::<Record>() => Err(len),
                _ => Ok(Some(record)),
            });
        }
        let mut bytes = [0; size_of::<Record1>()];
        let len = fill(&mut self.input, &mut bytes)?;
        let record: Record1 = zerocopy::transmute!(bytes);
        Ok(match len {
            0 => Ok(None),
            len if len < size_of::<Record1>() => Err(len),
            _ => Ok(Some(record.upgrade())),
        })
    }

    /// Whether the next record can be read without waiting.
    pub fn is_ready(&self) -> bool {
        self.input.buffer().len() >= self.record_size()
    }
}

/// Fills `buffer` as far as the input has bytes. Returns how many there were.
fn fill(input: &mut BufReader<impl Read>, buffer: &mut [u8]) -> io::Result<usize> {
    if let Some(bytes) = input.buffer().get(..buffer.len()) {
        buffer.copy_from_slice(bytes);
        input.consume(buffer.len());
        return Ok(buffer.len());
    }
    let mut len = 0;
    while len < buffer.len() {
        match input.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(count) => len += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// The error for a line of JSON that the server sent in place of a header.
fn refusal(input: impl Read) -> ReadError {
    let mut line = Vec::new();
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
