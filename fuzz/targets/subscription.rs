//! What a client of the trace asks for: any line is refused or means what it means when it is written anew.
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
