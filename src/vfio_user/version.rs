//! The versions and capabilities of both sides ("VFIO_USER_VERSION").

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::device::Refused;
use super::message::{MAX_DATA, MAX_FDS, Version};

/// The only major version that exists.
const MAJOR: u16 = 0;

/// The latest minor version, which has device features, and migration as VFIO has it now.
const MINOR: u16 = 2;

/// The page sizes of which regions may be multiples, or'ed together.
const PAGE_SIZES: u64 = 4096;

/// The client's version and capabilities.
#[derive(Debug, PartialEq, Eq)]
pub struct ClientVersion {
    /// Its version, or the latest if it knows a later one.
    minor: u16,
    /// The most bytes of a DMA_READ or DMA_WRITE.
    pub max_data: usize,
    /// Whether it takes commands on a socket of their own.
    pub twin_socket: bool,
    /// Whether it may send several writes in one message.
    write_multiple: bool,
}

#[derive(Default, Deserialize)]
struct ClientData {
    #[serde(default)]
    capabilities: ClientCapabilities,
}

/// The capabilities that are used here. Others are ignored.
#[derive(Default, Deserialize)]
struct ClientCapabilities {
    max_msg_fds: Option<u64>,
    max_data_xfer_size: Option<u64>,
    twin_socket: Option<ClientTwinSocket>,
    write_multiple: Option<bool>,
}

#[derive(Deserialize)]
struct ClientTwinSocket {
    #[serde(default)]
    supported: bool,
}

#[derive(Serialize)]
struct ServerData {
    capabilities: ServerCapabilities,
}

#[derive(Serialize)]
struct ServerCapabilities {
    max_msg_fds: usize,
    max_data_xfer_size: usize,
    max_dma_maps: u32,
    pgsizes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    write_multiple: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    twin_socket: Option<ServerTwinSocket>,
}

#[derive(Serialize)]
struct ServerTwinSocket {
    supported: bool,
    fd_index: u32,
}

impl ClientVersion {
    /// Parses the payload of the client's VERSION.
    pub fn parse(payload: &[u8]) -> Result<ClientVersion, Refused> {
        let (version, data) = Version::ref_from_prefix(payload).map_err(|_| Refused::invalid("it has no version"))?;
        if version.major.get() != MAJOR {
            return Err(Refused::invalid(format!("its major version is {} and not {MAJOR}", version.major)));
        }
        let ClientData { capabilities: can } = match data {
            // SPDK sends neither.
            [] | [0] => ClientData::default(),
            [json @ .., 0] => {
                serde_json::from_slice(json).map_err(|error| Refused::invalid(format!("its JSON is wrong: {error}")))?
            }
            _ => return Err(Refused::invalid("its JSON does not end with a NUL")),
        };
        let max_data = can.max_data_xfer_size.and_then(|bytes| usize::try_from(bytes).ok());
        let takes_messages = can.max_msg_fds != Some(0) && max_data != Some(0);
        Ok(ClientVersion {
            minor: version.minor.get().min(MINOR),
            max_data: max_data.map_or(MAX_DATA, |bytes| bytes.min(MAX_DATA)),
            twin_socket: can.twin_socket.is_some_and(|twin| twin.supported) && takes_messages,
            write_multiple: can.write_multiple == Some(true),
        })
    }

    /// The reply's payload. With `twin_socket` the reply's first descriptor is the client's end of the twin socket.
    pub fn reply(&self, max_dma_maps: u32, twin_socket: bool) -> Result<Vec<u8>, Refused> {
        let capabilities = ServerCapabilities {
            max_msg_fds: MAX_FDS,
            max_data_xfer_size: MAX_DATA,
            max_dma_maps,
            pgsizes: PAGE_SIZES,
            write_multiple: self.write_multiple.then_some(true),
            twin_socket: twin_socket.then_some(ServerTwinSocket { supported: true, fd_index: 0 }),
        };
        let version = Version { major: MAJOR.into(), minor: self.minor.into() };
        let mut payload = version.as_bytes().to_vec();
        serde_json::to_writer(&mut payload, &ServerData { capabilities })
            .map_err(|error| Refused::new(libc::EIO, error))?;
        payload.push(0);
        Ok(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(minor: u16, data: &str) -> Result<ClientVersion, Refused> {
        let version = Version { major: MAJOR.into(), minor: minor.into() };
        ClientVersion::parse(&[version.as_bytes(), data.as_bytes()].concat())
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let plain = ClientVersion { minor: 1, max_data: MAX_DATA, twin_socket: false, write_multiple: false };
        for data in
            ["", "\0", "{}\0", "{\"capabilities\":{}}\0", "{\"other\":[1]}\0", "{\"capabilities\":{\"x\":{}}}\0"]
        {
            assert_eq!(parse(1, data).unwrap(), plain, "{data}");
        }
        let twin = parse(7, "{\"capabilities\":{\"twin_socket\":{\"supported\":true},\"max_data_xfer_size\":4096}}\0")
            .unwrap();
        assert_eq!(twin, ClientVersion { minor: MINOR, max_data: 4096, twin_socket: true, write_multiple: false });
        let none = parse(0, "{\"capabilities\":{\"twin_socket\":{\"supported\":true},\"max_msg_fds\":0}}\0").unwrap();
        assert!(!none.twin_socket, "it takes no descriptor");
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for data in [
            "{}",
            "{\0",
            "\"\0",
            "{\"capabilities\":\"23\"}\0",
            "{\"capabilities\":{\"max_msg_fds\":\"foo\"}}\0",
            "{\"capabilities\":{\"max_msg_fds\":-1}}\0",
            "{\"capabilities\":{\"twin_socket\":5}}\0",
        ] {
            assert_eq!(parse(0, data).unwrap_err().errno, libc::EINVAL, "{data}");
        }
        assert!(ClientVersion::parse(&[0, 0, 0]).is_err());
        assert!(ClientVersion::parse(&[1, 0, 0, 0]).is_err());
    }
}
