//! A model that a client drives over a socket, while the test can quiesce, save and load it.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::Value;
use viommu::devices::Device;
use viommu::devices::kit::Lifecycle;
use viommu::pci::{Function, FunctionContext, Identity};
use viommu_trace::Tracer;

use viommu_testkit::function::Served;

struct Model {
    lifecycle: Box<dyn Lifecycle>,
    context: FunctionContext,
}

/// The model of the client that is connected.
#[derive(Clone)]
pub struct Held {
    device: Arc<dyn Device>,
    model: Arc<Mutex<Option<Model>>>,
}

impl Held {
    /// Serves what `device` makes, at this endpoint.
    pub fn serve(device: Arc<dyn Device>, endpoint: u32, tracer: Tracer) -> (Held, Served) {
        let held = Held { device, model: Arc::default() };
        let of_client = held.clone();
        let make = move |context: FunctionContext| -> Box<dyn Function> {
            let lifecycle = of_client.device.make(context.clone());
            *of_client.lock() = Some(Model { lifecycle, context });
            Box::new(Client(of_client.clone()))
        };
        (held, Served::new(endpoint, tracer, make, || ()))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Model>> {
        self.model.lock().expect("the model panicked")
    }

    fn with<R>(&self, act: impl FnOnce(&mut dyn Lifecycle) -> R) -> R {
        act(self.lock().as_mut().expect("a client is connected").lifecycle.as_mut())
    }

    pub fn quiesce(&self) {
        self.with(|model| model.quiesce());
    }

    pub fn resume(&self) {
        self.with(|model| model.resume());
    }

    pub fn reset(&self) {
        self.with(|model| model.reset());
    }

    /// The state of a model at rest.
    pub fn save(&self) -> Value {
        self.with(|model| serde_json::to_value(model.save()).unwrap())
    }

    /// Loads a state into a model at rest. The error says why that is refused.
    pub fn load(&self, state: Value) -> Result<(), String> {
        let state = serde_json::from_value(state).unwrap();
        self.with(|model| model.load(&state)).map_err(|error| error.to_string())
    }

    /// Saves the model's state and loads it into a new model, which takes its place.
    pub fn migrate(&self) {
        let mut model = self.lock();
        let Model { lifecycle, context } = model.as_mut().expect("a client is connected");
        lifecycle.quiesce();
        // In the form in which it is kept, or sent to another host.
        let kept = serde_json::to_string(&lifecycle.save()).unwrap();
        let state = serde_json::from_str(&kept).unwrap();
        let mut other = self.device.make(context.clone());
        other.quiesce();
        other.load(&state).unwrap();
        *lifecycle = other;
        lifecycle.resume();
    }

    /// Bytes that the endpoint has moved so far.
    pub fn traffic(&self) -> u64 {
        let model = self.lock();
        let counters = model.as_ref().expect("a client is connected").context.dma.counters();
        [&counters.read, &counters.written, &counters.bypassed].map(|count| count.load(Relaxed)).iter().sum()
    }
}

/// The function that the client sees.
struct Client(Held);

impl Function for Client {
    fn identity(&self) -> Identity {
        self.0.with(|model| model.identity())
    }

    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        self.0.with(|model| model.bar_read(bar, offset, data));
    }

    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        self.0.with(|model| model.bar_write(bar, offset, data));
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Ok(mut model) = self.0.model.lock() {
            *model = None;
        }
    }
}
