//! Subscriptions of trace clients: any line is refused, or means the same when it is written and parsed again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use viommu_trace::Subscription;

fuzz_target!(|line: &[u8]| {
    if let Ok(subscription) = Subscription::parse(line) {
        let again = Subscription::parse(subscription.line().trim_end().as_bytes());
        assert_eq!(again.as_ref(), Ok(&subscription));
        let _ = subscription.filter();
    }
});
