//! What the command says about reservations that outlive their domain's last endpoint.

use crate::soak::daemon::{Daemon, IDLE};
use viommu_testkit::frontend::split::{PAGE, range};
use viommu_testkit::frontend::{Driver, INVAL, OK, READ};
use viommu_wire::split::request_type::RESERVE;

#[test]
fn a_driver_that_takes_reservations_for_gone_is_told_once() {
    for request in 0..4 {
        let daemon = Daemon::start();
        let mut driver = Driver::started(&daemon.socket("viommu.sock"), u64::MAX);
        let (endpoint, reserve) = (IDLE[0], range(RESERVE, 1, 0, PAGE - 1, 0));
        assert_eq!(driver.attach(1, endpoint), OK);
        assert_eq!(driver.request(&reserve), OK);
        // While the endpoint has been there all the time, it is the driver's own mistake.
        assert_eq!(driver.request(&reserve), INVAL);
        assert_eq!(driver.detach(1, endpoint), OK);
        let bypass = request == 3;
        if !bypass {
            assert_eq!(driver.attach(1, endpoint), OK);
        }
        for _ in 0..3 {
            let status = match request {
                0 => driver.request(&reserve),
                1 => driver.map(1, 0, PAGE - 1, 0, READ),
                2 => driver.unmap(1, 0, PAGE - 1),
                _ => driver.attach_bypass(1, endpoint),
            };
            assert_eq!(status, INVAL);
        }
        drop(driver);
        let said = daemon.end();
        assert_eq!(said.matches("reservations outlived that").count(), 1, "request {request}: {said}");
    }
}
