//! A value that a driver's callback sets and one future awaits, the threads that wait for the driver, and locks that cannot stay poisoned.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

/// A poisoned lock only says that another thread panicked; the data under these locks is whole at all times.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A value that a callback sets and one future awaits; `None` if the callback is dropped unset (a lost device).
pub(super) fn signal<T>() -> (Signal<T>, Waiter<T>) {
    let state = Arc::new(Mutex::new(State { value: None, closed: false, waker: None }));
    (Signal(state.clone()), Waiter(state))
}

/// Threads that each wait in the driver until it has called its callbacks. Dropping this waits for them: one that outlived
/// all other owners of its device would unload the driver while the process ends, and crash it.
#[cfg(not(target_arch = "wasm32"))]
#[derive(Default)]
pub(super) struct Threads(Mutex<Vec<std::thread::JoinHandle<()>>>);

#[cfg(not(target_arch = "wasm32"))]
impl Threads {
    /// Run `wait` on a thread of its own.
    pub fn spawn(&self, wait: impl FnOnce() + Send + 'static) {
        let mut threads = lock(&self.0);
        threads.retain(|thread| !thread.is_finished());
        threads.push(std::thread::spawn(wait));
    }
}

#[cfg(not(target_arch = "wasm32"))]
impl Drop for Threads {
    fn drop(&mut self) {
        for thread in std::mem::take(&mut *lock(&self.0)) {
            // A waker may drop the last owner on the very thread that woke it.
            if thread.thread().id() != std::thread::current().id() {
                // A panic in a callback was reported where it happened.
                let _ = thread.join();
            }
        }
    }
}

struct State<T> {
    value: Option<T>,
    closed: bool,
    waker: Option<Waker>,
}

/// The sending half of [`signal`].
pub(super) struct Signal<T>(Arc<Mutex<State<T>>>);

/// The awaited half of [`signal`].
pub(super) struct Waiter<T>(Arc<Mutex<State<T>>>);

impl<T> Signal<T> {
    pub fn set(self, value: T) {
        lock(&self.0).value = Some(value);
    }
}

impl<T> Drop for Signal<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = lock(&self.0);
            state.closed = true;
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Future for Waiter<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = lock(&self.0);
        if state.closed {
            return Poll::Ready(state.value.take());
        }
        state.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn threads_are_waited_for_but_not_by_themselves() {
        let done = Arc::new(AtomicBool::new(false));
        let threads = Arc::new(Threads::default());
        let set = done.clone();
        threads.spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(50));
            set.store(true, Ordering::SeqCst);
        });
        drop(threads);
        assert!(done.load(Ordering::SeqCst));

        let threads = Arc::new(Threads::default());
        let (send, receive) = std::sync::mpsc::channel();
        let last = threads.clone();
        let (go, begin) = std::sync::mpsc::channel();
        threads.spawn(move || {
            let _ = begin.recv();
            drop(last);
            let _ = send.send(());
        });
        drop(threads);
        let _ = go.send(());
        assert!(receive.recv_timeout(std::time::Duration::from_secs(5)).is_ok());
    }
}
