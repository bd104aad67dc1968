//! VERSION.

use crate::vfio_user::memo::Session;
use serde_json::json;
use viommu::vfio_user::Backing;
use viommu_testkit::vfio::*;

#[test]
fn the_server_says_what_it_can_whatever_the_client_says() {
    let expected = json!({"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "max_dma_maps": 77, "pgsizes": 4096});
    // Nothing, as SPDK's initiator sends; then more and more.
    for json in ["", "{}", "{\"capabilities\":{}}", "{\"capabilities\":{\"max_msg_fds\":8}}", "{\"else\":1}"] {
        let (session, mut client) = Session::start();
        let (said, fd) = client.version(0, json);
        assert_eq!(said, json!({ "capabilities": expected }), "{json}");
        assert!(fd.is_none());
        session.end(client);
    }
    let (session, mut client) = Session::start();
    let reply = client.call(command::VERSION, &[0, 0, 9, 0], &[]).unwrap();
    assert_eq!(reply[..4], [0, 0, 2, 0], "the lower one of both minor versions");
    assert_eq!(*reply.last().unwrap(), 0);
    session.end(client);
}

#[test]
fn options_are_offered_only_to_clients_that_know_them() {
    let (session, mut client) = Session::start();
    let (said, fd) =
        client.version(1, "{\"capabilities\":{\"write_multiple\":true,\"twin_socket\":{\"supported\":true}}}");
    assert_eq!(said["capabilities"]["write_multiple"], true);
    assert_eq!(said["capabilities"]["twin_socket"], json!({"supported": true, "fd_index": 0}));
    assert!(fd.is_some());
    session.end(client);
    let (session, mut client) = Session::start();
    let (said, fd) =
        client.version(1, "{\"capabilities\":{\"write_multiple\":false,\"twin_socket\":{\"supported\":false}}}");
    assert_eq!(said["capabilities"].as_object().unwrap().len(), 4);
    assert!(fd.is_none());
    session.end(client);
}

#[test]
fn a_version_that_cannot_be_is_refused_and_ends_the_session() {
    let wrong: [&[u8]; 10] = [
        b"",
        b"\0\0\0",
        b"\x01\0\0\0{}\0",
        b"\0\0\0\0{}",
        b"\0\0\0\0{\0",
        b"\0\0\0\0\"\0",
        b"\0\0\0\0{\"capabilities\":\"23\"}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":\"foo\"}}\0",
        b"\0\0\0\0{\"capabilities\":{\"max_msg_fds\":-1}}\0",
        b"\0\0\0\0\xff\xff\xff\0",
    ];
    for payload in wrong {
        let (session, mut client) = Session::start();
        assert_eq!(client.call(command::VERSION, payload, &[]), Err(libc::EINVAL), "{payload:x?}");
        let (memo, result) = session.join();
        assert!(result.is_err() && memo.calls.is_empty());
    }
    // A second VERSION is refused too.
    let (session, mut client) = Session::start();
    client.version(0, "{}");
    assert_eq!(client.call(command::VERSION, &[0; 4], &[]), Err(libc::EINVAL));
    assert!(client.region_read(0, 0, 4).is_ok());
    session.end(client);
}

#[test]
fn a_version_without_a_reply_gets_no_socket() {
    let (session, mut client) = Session::start();
    let json = b"{\"capabilities\":{\"twin_socket\":{\"supported\":true}}}\0";
    client.send(command::VERSION, NO_REPLY, &[&[0, 0, 1, 0], &json[..]].concat(), &[]);
    // The version is agreed on nevertheless.
    assert_eq!(client.call(command::VERSION, &[0; 4], &[]), Err(libc::EINVAL));
    client.dma_map(READ | WRITE, 0, 0x1000, 0x1000, &[]).unwrap();
    let map = session.maps.lock().unwrap().pop().unwrap();
    assert!(matches!(map.backing, Backing::Unreachable), "{map:?}");
    session.end(client);
}

#[test]
fn deep_json_is_refused_like_any_other() {
    let (session, mut client) = Session::start();
    let payload = [&[0; 4][..], "[".repeat(100_000).as_bytes(), &[0]].concat();
    assert_eq!(client.call(command::VERSION, &payload, &[]), Err(libc::EINVAL));
    drop(session);
}
