//! A value that a driver's callback sets and one future awaits, and locks that cannot stay poisoned.

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
