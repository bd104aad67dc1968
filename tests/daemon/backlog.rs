//! Useless connections, for which a later connection has to wait.

use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::{end, folder, serve_with};
use viommu_testkit::frontend::{Driver, EP2, OK, REQUESTS};
use viommu_testkit::memfd;
use viommu_trace::Kind;
use viommu_trace::event::Channel;
use viommu_trace::{Event, Reader, Subscription};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How many useless connections there are.
const COUNT: usize = 400;
/// How long each may take at most. The server once waited 50 ms after each that ended with an error, which took longer.
const EACH: Duration = Duration::from_millis(20);

/// Connects, and does something useless of this kind before it leaves.
fn disturb(socket: &Path, kind: usize) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let sent = match kind % 5 {
        0 => Ok(()),
        1 => stream.write_all(&[0xff; 64]),
        // Half a header, of both protocols.
        2 => stream.write_all(&[1, 0, 9]),
        // A header whose body never comes: SET_MEM_TABLE, which is no command of vfio-user.
        3 => stream.write_all(&[5, 0, 0, 0, 1, 0, 0, 0, 200, 0, 0, 0, 0, 0, 0, 0]),
        _ => {
            let file = memfd(4096);
            let sent = stream.send_with_fds(&[&[0xff_u8; 16][..]], &[file.as_raw_fd(); 8]);
            sent.map(drop).map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
        }
    };
    if let Err(error) = sent {
        assert!([ErrorKind::BrokenPipe, ErrorKind::ConnectionReset].contains(&error.kind()), "{error}");
    }
}

/// While `first` is served, the useless connections queue up, and then a useful one, for which `serve` waits. Returns
/// how long that took after `first` had left.
fn wait_behind<T>(socket: &Path, first: T, serve: impl FnOnce()) -> Duration {
    (0..COUNT).for_each(|kind| disturb(socket, kind));
    let begun = Instant::now();
    drop(first);
    serve();
    begun.elapsed()
}

#[test]
fn a_connection_after_many_useless_ones_is_served_soon() {
    let folder = folder();
    let (daemon, _) = serve_with(folder.path(), &["--trace-socket", "trace.sock"]);
    let socket = |name: &str| folder.path().join(name);
    let subscription = Subscription { kinds: vec![Kind::Session], ..Subscription::default() };
    let mut reader = Reader::connect(&socket("trace.sock"), &subscription).unwrap();
    let sessions = thread::spawn(move || {
        let records = std::iter::from_fn(|| reader.next_record().unwrap());
        let begun = |event| match event {
            Event::Session { channel, connected: true, .. } => Some(channel),
            _ => None,
        };
        records.filter_map(|record| begun(Event::decode(&record).unwrap())).collect::<Vec<_>>()
    });

    let frontend = wait_behind(&socket("viommu.sock"), Driver::connect(&socket("viommu.sock")), || {
        let mut driver = Driver::connect(&socket("viommu.sock"));
        driver.negotiate(u64::MAX);
        driver.set_memory();
        driver.start_queue(REQUESTS, 0);
        assert_eq!(driver.attach(1, EP2), OK);
    });
    let client = || vfio_user::Client::new(&socket("dma0.sock")).unwrap();
    let client = wait_behind(&socket("dma0.sock"), client(), || {
        let mut vendor = [0; 2];
        client().region_read(7, 0, &mut vendor).unwrap();
        assert_eq!(vendor, [0x86, 0x80]);
    });
    println!("behind {COUNT} connections a frontend waited for {frontend:?}, a client for {client:?}");

    let said = end(daemon);
    let sessions = sessions.join().unwrap();
    for (channel, waited) in [(Channel::VhostUser, frontend), (Channel::VfioUser, client)] {
        // All were served: the useless ones, and the two useful ones.
        assert_eq!(sessions.iter().filter(|begun| **begun == channel).count(), COUNT + 2);
        assert!(waited < EACH * COUNT as u32, "{channel:?}: {waited:?}");
    }
    for of in ["The vhost-user connection ended", "The connection on dma0.sock ended"] {
        assert!(said.contains(of), "nothing of it was wrong: {said}");
    }
}
